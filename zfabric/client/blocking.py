"""The blocking reader of one answer, which a loop in another thread fills."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from zfabric.client import process
from zfabric.client.connection import Connection
from zfabric.client.mailbox import Mailbox
from zfabric.client.reading import Reading
from zfabric.client.results import Completion
from zfabric.errors import ClosedError, FabricError
from zfabric.limits import WINDOW_UNITS
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.payloads import Delta

#: Consumed units are told to the loop's thread in portions: each portion wakes it.
_CREDIT_PORTION: Final = WINDOW_UNITS // 8


class BlockingStream(Reading, Iterator[Delta]):
    """An answer as it is made: an iterator of `Delta` for one thread at a time.

    Leaving its ``with``, closing it, or dropping it unread cancels the request. After a fork the child gets ClosedError.

    Example:
        >>> for delta in client.stream("smollm2", "Once upon a time"):
        ...     print(delta.text, end="")
    """

    def __init__(self, connection: Connection, model: str, choices: int) -> None:
        self._mailbox = SharedMailbox(choices)
        super().__init__(model, self._mailbox)
        self._connection = connection
        self._unreported = 0

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> Delta:
        # Before the lock, which the parent's other thread may have held when it forked.
        if self._home is not process.here:
            raise process.left(self._home)
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
        if self._unreported >= _CREDIT_PORTION:
            self._report()
        return delta

    def _report(self) -> None:
        pending, units = self._pending, self._unreported
        self._unreported = 0
        if pending is not None:
            self._connection.soon(lambda: self._connection.consumed(pending, units))

    def collect(self) -> Completion:
        """Read to the end. Returns the whole answer, with what was read before.

        Raises:
            FabricError: What ended the request, or RequestCancelledError if the stream was closed.

        Example:
            >>> stream = client.stream("smollm2", "Once upon a time", n=2)
            >>> first = next(stream)
            >>> [choice.text for choice in stream.collect().choices]
        """
        for _ in self:
            pass
        return self._completion()

    def texts(self, index: int = 0) -> BlockingTexts:
        """The text of one choice, piece by piece, without what is empty.

        Raises:
            ParameterRangeError: There is no such choice.

        Example:
            >>> for text in client.stream("smollm2", "Once upon a time").texts():
            ...     print(text, end="")
        """
        return BlockingTexts(self, self._choice(index))

    def cancel(self) -> None:
        """Stop the request now. Reading on raises RequestCancelledError after what had arrived; unknown once ended."""
        process.check(self._home)
        if self._pending is not None and not self._mailbox.finished:
            self._connection.dropped(self._pending)

    def close(self) -> None:
        """Stop the request, and forget what had arrived."""
        self.cancel()
        with self._mailbox.changed:
            self._mailbox.discard()

    def __enter__(self) -> BlockingStream:
        process.check(self._home)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A child that leaves its parent's block has nothing to close.
        with contextlib.suppress(ClosedError):
            self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.cancel()


class BlockingTexts(Iterator[str]):
    """The text of one choice: an iterator. An interrupt while it waits leaves it, and its stream, readable."""

    def __init__(self, stream: BlockingStream, index: int) -> None:
        self._stream = stream
        self._index = index

    def __iter__(self) -> BlockingTexts:
        return self

    def __next__(self) -> str:
        while True:
            delta = next(self._stream)
            if delta.index == self._index and delta.text:
                return delta.text


class SharedMailbox(Mailbox):
    """A mailbox that the loop's thread fills and a caller's thread empties."""

    __slots__ = ("changed",)

    def __init__(self, choices: int) -> None:
        self.changed = threading.Condition(threading.Lock())
        super().__init__(self.changed.notify_all, choices)

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        with self.changed:
            super().arrived(index, text, token_ids, extra)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        with self.changed:
            super().ended(error, outcome)
