"""The asyncio reader of one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from zfabric.client.mailbox import Mailbox
from zfabric.client.reading import Reading
from zfabric.core.pending import Pending
from zfabric.errors import RequestCancelledError
from zfabric.wire.payloads import Delta


class StreamOwner(Protocol):
    """What a stream needs of its client."""

    def consumed(self, pending: Pending, units: int) -> None: ...
    def cancel(self, pending: Pending) -> None: ...


class TokenStream(Reading):
    """An answer as it is made: an async iterator of `Delta`.

    A reader that comes late gets what came meanwhile as one larger delta; nothing is dropped, and other streams do not
    wait. Closing the stream, leaving its ``async with``, cancelling the task that reads it, or dropping it unread cancels
    the request: the engine stops within a round trip. Iteration raises the error that ended the request, if one did.
    """

    def __init__(self, owner: StreamOwner, model: str) -> None:
        self._mailbox = Mailbox(_nothing)
        super().__init__(model, self._mailbox)
        self._owner = owner
        self._waiter: asyncio.Future[None] | None = None

    def _bind(self, make: Callable[[Mailbox], Pending]) -> None:
        # The mailbox must not refer to this object: dropping the stream has to be noticed.
        self._pending = make(self._mailbox)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Delta:
        mailbox = self._mailbox
        if not mailbox.waiting:
            while not mailbox.finished and not mailbox.waiting:
                await self._wait()
            if not mailbox.waiting:
                if mailbox.error is not None:
                    raise mailbox.error
                raise StopAsyncIteration
        delta = mailbox.take()
        if self._pending is not None:
            self._owner.consumed(self._pending, mailbox.units_taken)
        return delta

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks read the same stream")
        waiter = asyncio.get_running_loop().create_future()
        self._waiter = waiter

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._mailbox.wake = wake
        try:
            await waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._mailbox.wake = _nothing
            self._waiter = None

    def cancel(self) -> None:
        """Stop the request now. Reading on raises RequestCancelledError after what had arrived; unknown once ended."""
        if self._pending is not None and not self._mailbox.finished:
            self._owner.cancel(self._pending)

    async def aclose(self) -> None:
        """Stop the request, and forget what had arrived."""
        self.cancel()
        self._mailbox.waiting.clear()
        if isinstance(self._mailbox.error, RequestCancelledError):
            self._mailbox.error = None

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.cancel()


def _nothing() -> None:
    """Nobody waits."""
