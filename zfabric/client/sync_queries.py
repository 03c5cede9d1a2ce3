"""What a blocking client asks the controller: the questions of `queries`, behind calls that wait."""

from __future__ import annotations

from typing import Unpack

from zfabric.client.aio import AsyncClient
from zfabric.client.loop_thread import LoopThread
from zfabric.client.queries import ListOptions
from zfabric.wire.listings import ClientList, QueueList, RequestList
from zfabric.wire.status import FabricStatus, ModelStatus, WorkerStatus


class BlockingQueries:
    """As `AsyncQueries`."""

    _client: AsyncClient
    _thread: LoopThread

    def models(self, kind: str = "all", *, timeout: float | None = None) -> list[ModelStatus]:
        """As `AsyncClient.models`.

        Example:
            >>> [model.name for model in client.models("embedding")]
            ['minilm']
        """
        return self._thread.wait(self._client.models(kind, timeout=timeout))

    def model_details(self, model: str, *, timeout: float | None = None) -> ModelStatus:
        """As `AsyncClient.model_details`.

        Example:
            >>> client.model_details("smollm2").context_length
            8192
        """
        return self._thread.wait(self._client.model_details(model, timeout=timeout))

    def workers(self, *, timeout: float | None = None) -> list[WorkerStatus]:
        """As `AsyncClient.workers`.

        Example:
            >>> {worker.name: worker.in_flight for worker in client.workers()}
        """
        return self._thread.wait(self._client.workers(timeout=timeout))

    def status(self, *, timeout: float | None = None) -> FabricStatus:
        """As `AsyncClient.status`.

        Example:
            >>> client.status().queued
            0
        """
        return self._thread.wait(self._client.status(timeout=timeout))

    def requests(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> RequestList:
        """As `AsyncClient.requests`.

        Example:
            >>> [row.why for row in client.requests(state="queued").rows]
        """
        return self._thread.wait(self._client.requests(timeout=timeout, **wanted))

    def clients(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> ClientList:
        """As `AsyncClient.clients`.

        Example:
            >>> [row.client for row in client.clients().rows if row.waiting]
        """
        return self._thread.wait(self._client.clients(timeout=timeout, **wanted))

    def queue(self, *, timeout: float | None = None, **wanted: Unpack[ListOptions]) -> QueueList:
        """As `AsyncClient.queue`.

        Example:
            >>> [(row.model, row.waiting, row.why) for row in client.queue().rows]
        """
        return self._thread.wait(self._client.queue(timeout=timeout, **wanted))

    def refresh(self, *, timeout: float | None = None) -> list[str]:
        """As `AsyncClient.refresh`.

        Example:
            >>> client.refresh()
            ['gpu-1', 'gpu-2']
        """
        return self._thread.wait(self._client.refresh(timeout=timeout))

    def drain_worker(self, worker: str, limit_ms: int = 0, *, timeout: float | None = None) -> str:
        """As `AsyncClient.drain_worker`.

        Example:
            >>> client.drain_worker("gpu-1", limit_ms=60_000)
            'gpu-1'
        """
        return self._thread.wait(self._client.drain_worker(worker, limit_ms, timeout=timeout))
