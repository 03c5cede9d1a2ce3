"""The asyncio reader of one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any, Protocol

from zfabric.client import process
from zfabric.client.closing import AsyncClosing
from zfabric.client.mailbox import Mailbox
from zfabric.client.reading import Reading
from zfabric.client.results import Completion
from zfabric.core.client.pending import Pending
from zfabric.errors import RequestError
from zfabric.wire.payloads import Delta


class StreamOwner(Protocol):
    """What a stream needs of its client."""

    def consumed(self, pending: Pending, units: int) -> None: ...
    def cancel(self, pending: Pending) -> None: ...
    def dropped(self, pending: Pending) -> None: ...
    def new_future(self) -> asyncio.Future[None]: ...
    def check_loop(self) -> asyncio.AbstractEventLoop: ...


class TokenStream(Reading, AsyncClosing):
    """An answer as it is made: an async iterator of `Delta`. Awaited, it is the whole answer.

    A reader that comes late gets what came meanwhile as one larger delta; nothing is dropped, and other streams do not
    wait. Closing the stream, leaving its ``async with``, or dropping it unread cancels the request: the engine stops within
    a round trip. Cancelling one `anext`, as `asyncio.timeout` does, only ends that wait: the stream can be read on.
    Iteration raises the error that ended the request, if one did. After a fork the child gets ClosedError.

    Example:
        >>> stream = client.stream("smollm2", "Once upon a time", temperature=0)
        >>> async for delta in stream:
        ...     print(delta.text, end="")
        >>> completion = await client.stream("smollm2", "Once upon a time", temperature=0)
    """

    def __init__(self, owner: StreamOwner, model: str, choices: int) -> None:
        self._mailbox = Mailbox(_nothing, choices)
        super().__init__(model, self._mailbox)
        self._owner = owner
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> TokenStream:
        # Whether what came is all there already must not decide whether another loop may read it.
        self._owner.check_loop()
        return self

    async def __anext__(self) -> Delta:
        if self._home is not process.here:
            raise process.left(self._home)
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

    def __await__(self) -> Generator[Any, None, Completion]:
        return self.collect().__await__()

    async def collect(self) -> Completion:
        """Read to the end. Returns the whole answer, with what was read before.

        Cancelling it ends the wait alone, as with `anext`. ``await stream`` is the same.

        Raises:
            FabricError: What ended the request, or RequestCancelledError if the stream was closed.

        Example:
            >>> stream = client.stream("smollm2", "Once upon a time", n=2)
            >>> first = await anext(stream)
            >>> completion = await stream.collect()
            >>> [choice.text for choice in completion.choices]
        """
        async for _ in self:
            pass
        return self._completion()

    def texts(self, index: int = 0) -> TextStream:
        """The text of one choice, piece by piece, without what is empty.

        Raises:
            ParameterRangeError: There is no such choice.

        Example:
            >>> async for text in client.stream("smollm2", "Once upon a time").texts():
            ...     print(text, end="")
        """
        return TextStream(self, self._choice(index))

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RequestError("two tasks read the same stream")
        waiter = self._owner.new_future()
        self._waiter = waiter

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._mailbox.wake = wake
        try:
            await waiter
        finally:
            self._mailbox.wake = _nothing
            self._waiter = None

    def cancel(self) -> None:
        """Stop the request now. Reading on raises RequestCancelledError after what had arrived; unknown once ended."""
        process.check(self._home)
        if self._pending is not None and not self._mailbox.finished:
            self._owner.cancel(self._pending)

    async def aclose(self) -> None:
        """Stop the request, and forget what had arrived."""
        self.cancel()
        self._mailbox.discard()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._home is process.here and self._pending is not None and not self._mailbox.finished:
                self._owner.dropped(self._pending)


class TextStream:
    """The text of one choice: an async iterator. Cancelling one `anext` leaves it, and its stream, readable."""

    def __init__(self, stream: TokenStream, index: int) -> None:
        self._stream = stream
        self._index = index

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while True:
            delta = await self._stream.__anext__()
            if delta.index == self._index and delta.text:
                return delta.text


def _nothing() -> None:
    """Nobody waits."""
