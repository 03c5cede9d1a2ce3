"""What a blocking client asks the controller and has it change: `queries` and `steering`, behind calls that wait."""

from __future__ import annotations

from typing import Unpack

from zfabric.client.aio import AsyncClient
from zfabric.client.loop_thread import LoopThread
from zfabric.client.queries import ListOptions
from zfabric.limits import KICK_MS, UNTAKEN_MS
from zfabric.wire.explanations import Explanation
from zfabric.wire.listings import ClientList, QueueList, RequestList
from zfabric.wire.status import FabricStatus, ModelStatus, ScalingStatus, WorkerStatus
from zfabric.wire.steering import Setting, Stopped


class BlockingQueries:
    """As `AsyncQueries` and `AsyncSteering`."""

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

    def explain(self, request: str, *, limit: int = 100, timeout: float | None = None) -> Explanation:
        """As `AsyncClient.explain`.

        Example:
            >>> client.explain("5f2c9d0e1b7a4c33").choices[0].worker
            'gpu-1'
        """
        return self._thread.wait(self._client.explain(request, limit=limit, timeout=timeout))

    def scaling(self, *, timeout: float | None = None) -> list[ScalingStatus]:
        """As `AsyncClient.scaling`.

        Example:
            >>> {row.model: row.desired for row in client.scaling()}
            {'smollm2': 2}
        """
        return self._thread.wait(self._client.scaling(timeout=timeout))

    def release(self, affinity: str, *, timeout: float | None = None) -> bool:
        """As `AsyncClient.release`.

        Example:
            >>> client.release("session-17")
            True
        """
        return self._thread.wait(self._client.release(affinity, timeout=timeout))

    def refresh(self, *, timeout: float | None = None) -> list[str]:
        """As `AsyncClient.refresh`.

        Example:
            >>> client.refresh()
            ['gpu-1', 'gpu-2']
        """
        return self._thread.wait(self._client.refresh(timeout=timeout))

    # ── an operator's ─────────────────────────────────────────────────────────────────────────────────────────────────

    def drain_worker(self, worker: str, limit_ms: int = 0, *, stay: bool = False, timeout: float | None = None) -> str:
        """As `AsyncClient.drain_worker`.

        Example:
            >>> client.drain_worker("gpu-1", limit_ms=60_000)
            'gpu-1'
        """
        return self._thread.wait(self._client.drain_worker(worker, limit_ms, stay=stay, timeout=timeout))

    def undrain_worker(self, worker: str, *, timeout: float | None = None) -> str:
        """As `AsyncClient.undrain_worker`.

        Example:
            >>> client.undrain_worker("gpu-1")
            'gpu-1'
        """
        return self._thread.wait(self._client.undrain_worker(worker, timeout=timeout))

    def pause_model(self, model: str, *, wait_ms: int = UNTAKEN_MS, timeout: float | None = None) -> str:
        """As `AsyncClient.pause_model`.

        Example:
            >>> client.pause_model("smollm2", wait_ms=300_000)
            'smollm2'
        """
        return self._thread.wait(self._client.pause_model(model, wait_ms=wait_ms, timeout=timeout))

    def resume_model(self, model: str, *, timeout: float | None = None) -> str:
        """As `AsyncClient.resume_model`.

        Example:
            >>> client.resume_model("smollm2")
            'smollm2'
        """
        return self._thread.wait(self._client.resume_model(model, timeout=timeout))

    def cancel_request(self, request: str, *, client: str = "", timeout: float | None = None) -> Stopped:
        """As `AsyncClient.cancel_request`.

        Example:
            >>> client.cancel_request("2f1c66ab01d4e3f0").client
            'backend-1'
        """
        return self._thread.wait(self._client.cancel_request(request, client=client, timeout=timeout))

    def kick_client(self, client: str, *, refuse_ms: int = KICK_MS, timeout: float | None = None) -> Stopped:
        """As `AsyncClient.kick_client`.

        Example:
            >>> client.kick_client("backend-1").requests
        """
        return self._thread.wait(self._client.kick_client(client, refuse_ms=refuse_ms, timeout=timeout))

    def settings(self, *, timeout: float | None = None) -> list[Setting]:
        """As `AsyncClient.settings`.

        Example:
            >>> {row.name: row.value for row in client.settings() if row.changeable}
        """
        return self._thread.wait(self._client.settings(timeout=timeout))

    def change_setting(self, name: str, value: int | float | str | None, *, timeout: float | None = None) -> Setting:
        """As `AsyncClient.change_setting`.

        Example:
            >>> client.change_setting("speed.gpu-1", 2.0).value
            2.0
        """
        return self._thread.wait(self._client.change_setting(name, value, timeout=timeout))
