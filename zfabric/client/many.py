"""Many requests of one kind, a bounded number at a time, with results in order of completion."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from zfabric.client import process, values
from zfabric.client.closing import AsyncClosing
from zfabric.client.connection import Connection
from zfabric.client.mailbox import Collector
from zfabric.client.options import Messages
from zfabric.client.requests import generate_request, model_name
from zfabric.client.results import Completion
from zfabric.core.client.pending import Pending
from zfabric.errors import ClosedError, FabricError, RequestError
from zfabric.limits import CLIENT_REQUESTS_MAX

#: A text, token ids, or the messages of a chat.
Prompt = str | Sequence[int] | Messages
#: Which prompt, and what became of it.
Result = tuple[int, Completion | FabricError]


class Feed:
    """Prompts that become requests one by one.

    Args:
        model, prompts, concurrency, options: As of `AsyncClient.generate_many`.

    Raises:
        FabricError: One of them is wrong, whatever the prompts are.
    """

    def __init__(
        self, model: object, prompts: Iterable[Prompt], concurrency: object, options: Mapping[str, Any]
    ) -> None:
        self.model = model_name(model)
        self.concurrency = values.whole("concurrency", concurrency)
        if not 1 <= self.concurrency <= CLIENT_REQUESTS_MAX:
            raise values.out_of_range("concurrency", self.concurrency, f"1 … {CLIENT_REQUESTS_MAX}")
        for name in ("prompt", "messages", "prompt_token_ids"):
            if name in options:
                raise RequestError(f"{name} has no place besides prompts", parameter=name)
        # With any prompt: what is wrong with the options is wrong for all.
        generate_request("x", options)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise values.wrong("prompts", prompts, "several prompts")
        self._options = dict(options)
        self._prompts = iter(prompts)
        self._position = -1

    def next(self) -> tuple[int, Prompt] | None:
        """The next prompt and its position, None after the last. Raises what the caller's iterable raises."""
        for prompt in self._prompts:
            self._position += 1
            return self._position, prompt
        return None

    def submit(self, connection: Connection, prompt: Prompt, sink: Collector) -> Pending:
        """Ask for one. Raises: FabricError if it can never be sent."""
        request, submit = generate_request(*self._asked(prompt))
        return connection.submit("generate", request, sink, model=self.model, **submit)

    @property
    def choices(self) -> int:
        """Choices of each."""
        return int(self._options.get("n", 1))

    def _asked(self, prompt: Prompt) -> tuple[str | None, dict[str, Any]]:
        if isinstance(prompt, str):
            return prompt, self._options
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
            return None, {**self._options, "messages": prompt}
        if prompt is None:
            raise values.wrong("prompts", prompt, "texts, lists of token ids, or lists of messages")
        return None, {**self._options, "prompt_token_ids": prompt}


class Results(Protocol):
    """Where results wait for their reader."""

    def put_nowait(self, item: Result, /) -> None: ...


class Running:
    """What runs of a batch. It does not know the batch, so that a batch which is dropped is noticed."""

    def __init__(self, connection: Connection, feed: Feed, results: Results) -> None:
        self._connection = connection
        self._feed = feed
        self._results = results
        self._pending: dict[int, Pending] = {}
        #: How many were asked for: each has a result.
        self.begun = 0
        #: Set once the client is closed: nothing more can be asked.
        self.closed: ClosedError | None = None

    def begin(self, taken: list[tuple[int, Prompt]]) -> None:
        """Ask for some. The result of each comes in any case."""
        for position, prompt in taken:
            collector = self._collector(position)
            self.begun += 1
            try:
                self._pending[position] = self._feed.submit(self._connection, prompt, collector)
            except FabricError as error:
                if isinstance(error, ClosedError):
                    self.closed = error
                self._results.put_nowait((position, error))

    def _collector(self, position: int) -> Collector:
        def ended() -> None:
            pending = self._pending.pop(position, None)
            request_id = f"{pending.number:x}" if pending is not None else ""
            try:
                result: Completion | FabricError = collector.completion(request_id, self._feed.model)
            except FabricError as error:
                result = error
            self._results.put_nowait((position, result))

        def consumed(units: int) -> None:
            if (pending := self._pending.get(position)) is not None:
                self._connection.consumed(pending, units)

        collector = Collector(self._feed.choices, ended, consumed)
        return collector

    def cancel(self) -> None:
        """Stop all of it."""
        for pending in list(self._pending.values()):
            self._connection.cancel(pending)


class _Batch:
    """What both iterators are: places that prompts take, and that become free when a result was read."""

    def __init__(self, connection: Connection, feed: Feed, results: Results) -> None:
        self._home = process.here
        self._connection = connection
        self._feed: Feed | None = feed
        self._running = Running(connection, feed, results)
        self._room = feed.concurrency
        self._read = 0

    @property
    def _open(self) -> int:
        """Results that are still to be read."""
        return self._running.begun - self._read

    def _take(self) -> list[tuple[int, Prompt]]:
        """Prompts for the places that are free. Raises: ClosedError once nothing is left to be read from a closed client."""
        process.check(self._home)
        if self._running.closed is not None:
            self._feed = None
            if not self._open:
                raise self._running.closed
        taken: list[tuple[int, Prompt]] = []
        while self._feed is not None and self._open + len(taken) < self._room:
            following = self._feed.next()
            if following is None:
                self._feed = None
            else:
                taken.append(following)
        return taken

    def _stop(self) -> None:
        process.check(self._home)
        self._feed = None
        self._read = self._running.begun
        self._connection.soon(self._running.cancel)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._home is process.here:
                self._connection.soon(self._running.cancel)


class CompletionBatch(_Batch, AsyncClosing):
    """Results of `AsyncClient.generate_many`: an async iterator of (position, Completion or FabricError).

    Closing it, leaving its ``async with``, or dropping it cancels what runs. Cancelling one `anext` ends that wait alone.
    If the client is closed, what runs ends with ClosedError, and then the iterator does.
    """

    def __init__(self, connection: Connection, feed: Feed) -> None:
        self._results: asyncio.Queue[Result] = asyncio.Queue()
        super().__init__(connection, feed, self._results)
        connection.check_open()
        self._fill()

    def __aiter__(self) -> CompletionBatch:
        return self

    async def __anext__(self) -> Result:
        self._fill()
        if not self._open:
            raise StopAsyncIteration
        self._connection.check_loop()
        result = await self._results.get()
        self._read += 1
        return result

    def _fill(self) -> None:
        self._running.begin(self._take())

    async def aclose(self) -> None:
        """Stop what runs, and forget what was not read."""
        self._stop()


class BlockingBatch(_Batch, Iterator[Result]):
    """Results of `Client.generate_many`: an iterator of (position, Completion or FabricError), for one thread at a time.

    Prompts are taken in the thread that reads. Closing it, leaving its ``with``, or dropping it cancels what runs. If the
    client is closed, what runs ends with ClosedError, and then the iterator does.
    """

    def __init__(self, connection: Connection, feed: Feed, run: Callable[[Callable[[], None]], None]) -> None:
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        super().__init__(connection, feed, self._results)
        self._run = run
        self._fill()

    def __iter__(self) -> BlockingBatch:
        return self

    def __next__(self) -> Result:
        self._fill()
        if not self._open:
            raise StopIteration
        result = self._results.get()
        self._read += 1
        return result

    def _fill(self) -> None:
        taken = self._take()
        if not taken:
            return
        try:
            self._run(lambda: self._running.begin(taken))
        except ClosedError as error:
            # What was asked before has ended, and is still to be read.
            self._running.closed, self._feed = error, None
            if not self._open:
                raise

    def close(self) -> None:
        """Stop what runs, and forget what was not read."""
        self._stop()

    def __enter__(self) -> BlockingBatch:
        process.check(self._home)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ClosedError):
            self.close()
