"""Where a backend hands over what it made: the `StepSink` of one backend of a service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from zfabric.core.worker.cached import CacheChange
from zfabric.core.worker.orders import Columns
from zfabric.errors import BackendError, FabricError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import Delta
from zfabric.worker.base import BaseModelWorker


class Receiver(Protocol):
    """What a service does with it."""

    def emit_step(self, step: Iterable[tuple[str, Delta]]) -> None: ...
    def emit_columns(self, step: Columns, others: Iterable[tuple[str, Delta]]) -> None: ...
    def fail(self, request_id: str, error: BaseException) -> None: ...
    def cache_changed(self, change: CacheChange) -> None: ...
    def models_changed(self, backend: BaseModelWorker, models: Sequence[ModelInfo]) -> None: ...
    def log(self, event: str, **fields: object) -> None: ...
    def die(self, error: BaseException, backend: BaseModelWorker) -> None: ...


class BackendSink:
    """The sink of one backend.

    Args:
        receiver: The service.
        backend: Whose sink it is.
        loop: The service's event loop.
    """

    __slots__ = ("_backend", "_loop", "_receiver")

    def __init__(self, receiver: Receiver, backend: BaseModelWorker, loop: asyncio.AbstractEventLoop) -> None:
        self._receiver = receiver
        self._backend = backend
        self._loop = loop

    def emit(self, step: Iterable[tuple[str, Delta]]) -> None:
        self._receiver.emit_step(step)

    def emit_columns(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        texts: Sequence[str],
        others: Iterable[tuple[str, Delta]] = (),
    ) -> None:
        self._receiver.emit_columns(_columns(request_ids, token_ids, texts), others)

    def fail(self, request_id: str, error: BaseException) -> None:
        self._receiver.fail(request_id, error)

    def emit_threadsafe(self, step: Iterable[tuple[str, Delta]]) -> None:
        self._post(self._receiver.emit_step, list(step))

    def emit_columns_threadsafe(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        texts: Sequence[str],
        others: Iterable[tuple[str, Delta]] = (),
    ) -> None:
        self._post(self._receiver.emit_columns, _columns(request_ids, token_ids, texts), list(others))

    def fail_threadsafe(self, request_id: str, error: BaseException) -> None:
        self._post(self._receiver.fail, request_id, error)

    def cache_changed_threadsafe(
        self,
        model: str,
        stored: Sequence[bytes] = (),
        removed: Sequence[bytes] = (),
        *,
        unit: int,
        cleared: bool = False,
    ) -> None:
        self._post(self._receiver.cache_changed, CacheChange(model, list(stored), list(removed), unit, cleared))

    def models_changed(self, models: Sequence[ModelInfo]) -> None:
        self._receiver.models_changed(self._backend, models)

    def log(self, event: str, **fields: object) -> None:
        self._receiver.log(event, **{"backend": type(self._backend).__name__, **fields})

    def engine_died(self, error: FabricError) -> None:
        self._receiver.die(error, self._backend)

    def _post(self, call: Callable[..., object], *arguments: Any) -> None:
        """From any thread to the event loop, in order; nobody is there any more when that is closed."""
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def _columns(request_ids: Sequence[str], token_ids: Sequence[int], texts: Sequence[str]) -> Columns:
    """A step. Raises: BackendError: The columns have different lengths."""
    if not len(request_ids) == len(token_ids) == len(texts):
        lengths = f"{len(request_ids)}, {len(token_ids)} and {len(texts)}"
        raise BackendError(f"columns of a step have {lengths} entries, they must be of one length")
    return Columns(request_ids, token_ids, texts)
