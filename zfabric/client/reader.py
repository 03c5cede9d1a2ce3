"""One reader of many answers, which takes all that has arrived in one call instead of one task switch a token."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Unpack

from zfabric.client import process
from zfabric.client.closing import AsyncClosing
from zfabric.client.connection import Connection
from zfabric.client.mailbox import Mailbox
from zfabric.client.options import GenerateOptions
from zfabric.client.reading import Reading
from zfabric.client.requests import generate_request, model_name
from zfabric.client.results import Completion
from zfabric.core.client.pending import Pending
from zfabric.errors import ClosedError, FabricError, RequestError
from zfabric.wire.answers import Outcome
from zfabric.wire.payloads import Delta

#: What arrived since the last look: streams, and what each has to say; None is its end.
Batch = list[tuple["AnswerStream", Delta | None]]


class _Inbox:
    """Streams of one reader for which something waits. It does not know the reader, so that a dropped one is noticed.

    Attributes:
        open: Streams whose end was not read.
        batch: What waits, in the order in which it came.
        closed: Whether the reader was closed.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.open: set[AnswerStream] = set()
        self.batch: Batch = []
        self.closed = False
        self._waiter: asyncio.Future[None] | None = None
        connection.closing.add(self)

    def put(self, stream: AnswerStream, delta: Delta | None) -> None:
        """Something came for a stream; None is its end."""
        self.batch.append((stream, delta))
        if self._waiter is not None:
            self.wake()

    def wake(self) -> None:
        """Have whoever waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until something is ready, or an end of all is possible. Raises: RequestError if another task waits."""
        if self._waiter is not None:
            raise RequestError("two tasks read the same reader")
        self._waiter = self.connection.new_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self) -> Batch:
        """All that waits."""
        batch, self.batch = self.batch, []
        read: list[tuple[Pending, int]] = []
        for stream, delta in batch:
            if delta is None:
                self.open.discard(stream)
            elif stream._pending is not None:
                read.append((stream._pending, stream._box.read(delta)))
        self.connection.consumed_all(read)
        return batch

    def cancel(self) -> None:
        """Stop all streams, and forget what waits."""
        self.closed = True
        streams, self.open = self.open, set()
        for stream in streams:
            stream._stop()
        self.batch.clear()
        self.wake()


class _Slot(Mailbox):
    """What arrives for one stream of an inbox: it waits there, among that of the others."""

    __slots__ = ("_inbox", "_stream")

    def __init__(self, stream: AnswerStream, choices: int) -> None:
        super().__init__(_nothing, choices)
        self._stream = stream
        self._inbox = stream._inbox

    def _put(self, delta: Delta) -> None:
        self._inbox.put(self._stream, delta)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        self._inbox.put(self._stream, None)


class AnswerStream(Reading):
    """One answer of an `AnswerReader`: what is known of it, as of a `TokenStream`; its deltas come from the reader."""

    def __init__(self, inbox: _Inbox, model: str, choices: int) -> None:
        self._inbox = inbox
        super().__init__(model, _Slot(self, choices))

    @property
    def done(self) -> bool:
        """Whether its end was read."""
        return self._box.finished and self not in self._inbox.open

    def completion(self) -> Completion:
        """The whole answer, once its end was read.

        Raises:
            FabricError: What ended the request.
            RequestError: It has not ended, or its end was not read.

        Example:
            >>> async for batch in reader:
            ...     for stream, delta in batch:
            ...         if delta is None:
            ...             print(stream.completion().text)
        """
        if not self.done:
            raise RequestError(f"the end of request {self.request_id} was not read")
        return self._completion()

    def cancel(self) -> None:
        """Stop the request now. What had arrived is still read, and then its end: `completion` raises
        RequestCancelledError. Nothing happens once it has ended."""
        process.check(self._home)
        if self._pending is not None and not self._box.finished:
            self._inbox.connection.cancel(self._pending)

    def _stop(self) -> None:
        if self._pending is not None and not self._box.finished:
            self._inbox.connection.cancel(self._pending)
        self._box.discard()


class AnswerReader(AsyncClosing):
    """Many answers, read by one task: an async iterator of all that arrived since the last look.

    Each batch is a list of (stream, `Delta`), in the order in which the streams had something to say; None in place of a
    delta is that stream's end, which comes exactly once, after its last delta. An error of one stream is that stream's end
    alone: `AnswerStream.completion` raises it. Iteration ends when no stream is open; `read` waits for more.

    What is in a batch counts as read, so its streams' engines go on. Closing the reader, leaving its ``async with``, or
    dropping it cancels all of its streams. Cancelling one `anext` or `read` ends that wait alone, and nothing is lost.
    After a fork the child gets ClosedError.

    Example:
        >>> async with client.reader() as reader:
        ...     for question in questions:
        ...         reader.stream("smollm2", question, max_new_tokens=64)
        ...     async for batch in reader:
        ...         for stream, delta in batch:
        ...             if delta is not None:
        ...                 print(stream.request_id, delta.text)
    """

    def __init__(self, connection: Connection) -> None:
        self._home = process.here
        self._connection = connection
        connection.check_open()
        self._inbox = _Inbox(connection)

    def stream(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Ask for text; the request leaves at once, and this reader has its answer. Any time is right for it.

        Args:
            model, prompt, options: As of `AsyncClient.stream`.

        Raises:
            FabricError: The request can never be sent; ClosedError, if the reader or the client was closed.

        Example:
            >>> stream = reader.stream("smollm2", "Once upon a time", seed=7)
        """
        if self._inbox.closed:
            raise ClosedError("the reader was closed")
        request, submit = generate_request(prompt, options)
        name = model_name(model)
        stream = AnswerStream(self._inbox, name, request.sampling.n)
        stream._bind(lambda sink: self._connection.submit("generate", request, sink, model=name, **submit))
        self._inbox.open.add(stream)
        return stream

    @property
    def open(self) -> int:
        """Streams whose end was not read."""
        return len(self._inbox.open)

    async def read(self) -> Batch:
        """All that has arrived; waits if that is nothing, also while no stream is open.

        Raises:
            ClosedError: The reader was closed, or the client was and all ends are read.
            RequestError: Another task reads.

        Example:
            >>> while True:
            ...     for stream, delta in await reader.read():
            ...         deliver(stream, delta)
        """
        process.check(self._home)
        self._connection.check_loop()
        inbox = self._inbox
        while True:
            if inbox.closed:
                raise ClosedError("the reader was closed")
            if taken := inbox.take():
                return taken
            self._connection.check_open()
            await inbox.wait()

    def __aiter__(self) -> AnswerReader:
        return self

    async def __anext__(self) -> Batch:
        process.check(self._home)
        if not self._inbox.open:
            raise StopAsyncIteration
        try:
            return await self.read()
        except ClosedError:
            if self._inbox.closed:
                raise StopAsyncIteration from None
            raise

    async def aclose(self) -> None:
        """Stop all streams, and forget what was not read. Whoever waits in `read` gets ClosedError."""
        process.check(self._home)
        self._inbox.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._home is process.here and self._inbox.open:
                self._connection.soon(self._inbox.cancel)


def _nothing() -> None:
    """Nobody waits for one stream alone."""
