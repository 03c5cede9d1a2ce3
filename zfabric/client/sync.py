"""The blocking client: the asyncio one on a thread of its own, behind calls that wait.

One implementation serves both, and beats, credit and failover go on while the caller computes. A token crosses threads
by a lock and a wake-up, not by a future.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from zfabric.client.aio import AsyncClient
from zfabric.client.mailbox import Mailbox
from zfabric.client.reading import Reading
from zfabric.client.requests import GenerateOptions, generate_request
from zfabric.client.results import Completion
from zfabric.core.pending import Pending
from zfabric.errors import ClosedError, FabricError, RequestCancelledError
from zfabric.limits import WINDOW_UNITS
from zfabric.transport.curve import Credentials
from zfabric.wire.payloads import Chunk, Delta, Message, Outcome
from zfabric.wire.status import FabricStatus, ModelStatus, WorkerStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
#: Consumed units are told to the loop's thread in portions: each portion wakes it.
_CREDIT_PORTION = WINDOW_UNITS // 8


class BlockingStream(Reading, Iterator[Delta]):
    """An answer as it is made: an iterator of `Delta` for one thread at a time.

    Leaving its ``with``, closing it, or dropping it unread cancels the request.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._mailbox = _SharedMailbox()
        super().__init__(model, self._mailbox)
        self._client = client
        self._unreported = 0

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Delta:
        mailbox = self._mailbox
        with mailbox.changed:
            while not mailbox.waiting and not mailbox.finished:
                mailbox.changed.wait()
            if not mailbox.waiting:
                if mailbox.error is not None:
                    raise mailbox.error
                raise StopIteration
            delta = mailbox.take()
            self._unreported += mailbox.units_taken
        if self._unreported >= _CREDIT_PORTION and self._pending is not None:
            self._client._report(self._pending, self._unreported)
            self._unreported = 0
        return delta

    def cancel(self) -> None:
        """Stop the request now."""
        if self._pending is not None and not self._mailbox.finished:
            self._client._cancel(self._pending)

    def close(self) -> None:
        """Stop the request, and forget what had arrived."""
        self.cancel()
        with self._mailbox.changed:
            self._mailbox.waiting.clear()
            if isinstance(self._mailbox.error, RequestCancelledError):
                self._mailbox.error = None

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.cancel()


class Client:
    """A blocking client, safe to share between threads. Use as a context manager.

    It belongs to the process that made it: after a fork its calls raise ClosedError, and the child makes its own.

    Args:
        endpoint, connect_timeout_ms, label, credentials: As of `AsyncClient`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_ms: int = 10_000,
        label: str = "",
        credentials: Credentials | None = None,
    ) -> None:
        self._client = AsyncClient(
            endpoint, connect_timeout_ms=connect_timeout_ms, label=label, credentials=credentials
        )
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def endpoint(self) -> str:
        """The controller's."""
        return self._client.endpoint

    def __enter__(self) -> Client:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all requests with ClosedError and stop the thread. Safe to call twice."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or os.getpid() != self._pid:
            return
        asyncio.run_coroutine_threadsafe(self._client.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> BlockingStream:
        """As `AsyncClient.stream`."""
        request, submit_options = generate_request(prompt, options)
        stream = BlockingStream(self, model)
        mailbox = stream._mailbox

        async def submit() -> Pending:
            return self._client._submit("generate", request, mailbox, model=model, **submit_options)

        stream._pending = self._wait(submit())
        return stream

    def generate(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """As `AsyncClient.generate`."""
        return self._wait(self._client.generate(model, prompt, **options))

    def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        deadline_ms: int | None = None,
        priority: int = 0,
        **options: Any,
    ) -> NDArray[np.float32]:
        """As `AsyncClient.embed`."""
        return self._wait(self._client.embed(model, inputs, deadline_ms=deadline_ms, priority=priority, **options))

    def count_tokens(self, model: str, prompt: str | None = None, *, messages: Sequence[Message] | None = None) -> int:
        """As `AsyncClient.count_tokens`."""
        return self._wait(self._client.count_tokens(model, prompt, messages=messages))

    def operate(self, worker: str, call: str, *, model: str = "", **arguments: Any) -> Any:
        """As `AsyncClient.operate`."""
        return self._wait(self._client.operate(worker, call, model=model, **arguments))

    def models(self, kind: str = "all") -> list[ModelStatus]:
        """As `AsyncClient.models`."""
        return self._wait(self._client.models(kind))

    def model_details(self, model: str) -> ModelStatus:
        """As `AsyncClient.model_details`."""
        return self._wait(self._client.model_details(model))

    def workers(self) -> list[WorkerStatus]:
        """As `AsyncClient.workers`."""
        return self._wait(self._client.workers())

    def status(self) -> FabricStatus:
        """As `AsyncClient.status`."""
        return self._wait(self._client.status())

    def refresh(self) -> list[str]:
        """As `AsyncClient.refresh`."""
        return self._wait(self._client.refresh())

    def drain_worker(self, worker: str, limit_ms: int = 0) -> str:
        """As `AsyncClient.drain_worker`."""
        return self._wait(self._client.drain_worker(worker, limit_ms))

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _running(self) -> asyncio.AbstractEventLoop:
        """The loop, started with its thread on first use.

        Raises:
            ClosedError: Closed, or used in another process than it was made in.
        """
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the client belongs to process {self._pid}; make a new one after a fork", process=self._pid
            )
        with self._lock:
            if self._closed:
                raise ClosedError("the client is closed")
            if self._loop is None:
                loop = self._loop = _new_loop()
                self._thread = threading.Thread(target=_run, args=(loop,), name="zfabric-client", daemon=True)
                self._thread.start()
                asyncio.run_coroutine_threadsafe(_call(self._client.open), loop).result()
            return self._loop

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait. An interrupt of the wait (Ctrl-C) cancels the work."""
        try:
            loop = self._running()
        except FabricError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _report(self, pending: Pending, units: int) -> None:
        self._soon(lambda: self._client.consumed(pending, units))

    def _cancel(self, pending: Pending) -> None:
        self._soon(lambda: self._client.cancel(pending))

    def _soon(self, call: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None and os.getpid() == self._pid:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call)


class _SharedMailbox(Mailbox):
    """A mailbox that the loop's thread fills and a caller's thread empties."""

    __slots__ = ("changed",)

    def __init__(self) -> None:
        super().__init__(self._notify)
        self.changed = threading.Condition(threading.Lock())

    def _notify(self) -> None:
        self.changed.notify()

    def arrived(self, chunk: Chunk) -> None:
        with self.changed:
            super().arrived(chunk)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        with self.changed:
            super().ended(error, outcome)


async def _call(function: Callable[[], None]) -> None:
    function()


def _new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed: half the time of a turn."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
