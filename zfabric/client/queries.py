"""What a client asks the controller about the fabric."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Raw

from zfabric.client import values
from zfabric.client.connection import Connection
from zfabric.client.requests import model_name, query_timeout_ms
from zfabric.wire import codec
from zfabric.wire.status import FabricStatus, ModelStatus, WorkerStatus

T = TypeVar("T")


class AsyncQueries:
    """Questions that the controller answers from memory.

    Each takes a `timeout` in seconds; None is 10. When it is over the call raises DeadlineExceededError, or what keeps this
    client from the controller.
    """

    _connection: Connection

    async def models(self, kind: str = "all", *, timeout: float | None = None) -> list[ModelStatus]:
        """Models that are served now: "all", "language", "multimodal" or "embedding" ones.

        Example:
            >>> [model.name for model in await client.models("embedding")]
            ['minilm']
        """
        return await self._ask_list("models", ModelStatus, timeout, kind=model_name(kind, "kind"))

    async def model_details(self, model: str, *, timeout: float | None = None) -> ModelStatus:
        """One model, by name or alias. Raises: UnknownModelError.

        Example:
            >>> (await client.model_details("smollm2")).context_length
            8192
        """
        return await self._ask("model", ModelStatus, timeout, name=model_name(model))

    async def workers(self, *, timeout: float | None = None) -> list[WorkerStatus]:
        """Registered workers.

        Example:
            >>> {worker.name: worker.in_flight for worker in await client.workers()}
        """
        return await self._ask_list("workers", WorkerStatus, timeout)

    async def status(self, *, timeout: float | None = None) -> FabricStatus:
        """The controller in figures.

        Example:
            >>> (await client.status()).queued
            0
        """
        return await self._ask("status", FabricStatus, timeout)

    async def refresh(self, *, timeout: float | None = None) -> list[str]:
        """Have every worker report its load now. Returns the names of those that are asked.

        Example:
            >>> await client.refresh()
            ['gpu-1', 'gpu-2']
        """
        return await self._ask_list("refresh", str, timeout)

    async def drain_worker(self, worker: str, limit_ms: int = 0, *, timeout: float | None = None) -> str:
        """Have a worker finish and leave; 0 is the worker's own limit. Returns its name. Raises: NoWorkerError.

        Example:
            >>> await client.drain_worker("gpu-1", limit_ms=60_000)
            'gpu-1'
        """
        limit = values.whole("limit_ms", limit_ms)
        if not 0 <= limit < 2**32:
            raise values.out_of_range("limit_ms", limit, f"0 … {2**32 - 1}")
        return await self._ask("drain", str, timeout, worker=model_name(worker, "worker"), limit_ms=limit)

    async def _ask(self, what: str, form: type[T], timeout: float | None, **arguments: object) -> T:
        parts = await self._parts(what, timeout, arguments)
        return codec.unpack_result(parts[-1], form)

    async def _ask_list(self, what: str, form: type[T], timeout: float | None, **arguments: object) -> list[T]:
        parts = await self._parts(what, timeout, arguments)
        return [row for part in parts for row in codec.unpack_result(part, list[form])]  # type: ignore[valid-type]

    async def _parts(self, what: str, timeout: float | None, arguments: dict[str, object]) -> list[Raw]:
        return await self._connection.ask(what, arguments, query_timeout_ms(timeout))
