"""Answers that are made bit by bit: as server-sent events, or whole.

An API module gives requests to the client library and a `Wording`, which says how its answers read; all else, from the
first delta to a caller that goes away, is the same for all APIs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from zfabric.client.reader import AnswerStream
from zfabric.client.results import Completion
from zfabric.errors import FabricError, QuotaExceededError
from zfabric.gateway.affinity import with_session
from zfabric.gateway.call import Call
from zfabric.gateway.http import Departure
from zfabric.limits import KEEP_ALIVE_MS, UNSENT_BYTES_MAX
from zfabric.wire.payloads import Delta

#: A comment, which readers of events skip and proxies take for life.
_KEEP_ALIVE = b": keep-alive\n\n"


class Ask(NamedTuple):
    """One request to the fabric: arguments of `AsyncClient.stream`."""

    model: str
    prompt: str | None
    options: dict[str, Any]


class Wording(Protocol):
    """How one API words an answer. One object for each HTTP request."""

    def delta(self, position: int, delta: Delta) -> bytes:
        """Events for what came of the request at `position`; empty for what is not told."""
        ...

    def ending(self, completions: list[Completion]) -> bytes:
        """The last events of a stream, after all deltas of all requests."""
        ...

    def failure(self, error: FabricError) -> bytes:
        """The last events of a stream that breaks off."""
        ...

    def whole(self, completions: list[Completion]) -> bytes:
        """The body of a response that is no stream."""
        ...


async def answer(
    call: Call, asks: Sequence[Ask], wording: Wording, *, stream: bool, kind: bytes = b"application/json"
) -> None:
    """Answer an HTTP request.

    A stream's status is held back until the first delta, so that an error has a status of its own; a long prefill ends that
    after KEEP_ALIVE_MS, with a comment. A caller who goes away cancels all requests in their engines at once; so does the
    cancellation of this call.

    Args:
        kind: The type of what `wording.whole` makes.

    Raises:
        FabricError: What ended a request before anything was said to the caller.
    """
    answers = _Answers(call, wording, len(asks), stream=stream)
    call.figures.streams += stream
    try:
        for ask in asks:
            answers.submit(ask)
        departure = Departure(call.receive, answers.leave)
        try:
            await answers.finished()
        finally:
            departure.close()
        if answers.error is not None and not call.response.started:
            raise answers.error
        if not stream and answers.error is None:
            await call.response.whole(200, wording.whole(answers.completions()), kind=kind)
        await call.response.flushed()
    finally:
        call.figures.streams -= stream
        answers.cancel()


class _Answers:
    """All requests of one HTTP request, told of by the task that reads."""

    def __init__(self, call: Call, wording: Wording, count: int, *, stream: bool) -> None:
        self.error: FabricError | None = None
        self._call = call
        self._response = call.response
        self._wording = wording
        self._streamed = stream
        self._positions: dict[AnswerStream, int] = {}
        self._completions: list[Completion | None] = [None] * count
        self._left = count
        self._first_ns = 0
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[None] = self._loop.create_future()

    def submit(self, ask: Ask) -> None:
        """Send one of the requests. Raises: FabricError: It can never be sent."""
        options = with_session(ask.options, self._call.headers)
        stream = self._call.fabric.stream(self, ask.model, ask.prompt, options)
        self._positions[stream] = len(self._positions)

    def leave(self) -> None:
        """Cancel what runs, since the caller went away."""
        if not self._done.done():
            self._call.gone = True
            self.cancel()

    async def finished(self) -> None:
        """Until all has ended, with a sign of life now and then."""
        if self._streamed:
            self._look_at(self._loop.time() + KEEP_ALIVE_MS / 1_000)
        try:
            await self._done
        finally:
            if self._looking is not None:
                self._looking.cancel()

    def _look_at(self, when_s: float) -> None:
        self._looking = self._loop.call_at(when_s, self._look)

    def _look(self) -> None:
        silent_s = time.monotonic() - self._response.written_at if self._response.started else math.inf
        if silent_s >= KEEP_ALIVE_MS / 1_000:
            if not self._response.started:
                self._response.start_events()
            self._response.write(_KEEP_ALIVE)
            silent_s = 0.0
        self._look_at(self._loop.time() + KEEP_ALIVE_MS / 1_000 - silent_s)

    def completions(self) -> list[Completion]:
        """All answers. Call once none is missing."""
        return [completion for completion in self._completions if completion is not None]

    def cancel(self) -> None:
        """Stop what still runs."""
        for stream in self._positions:
            if not stream.done:
                with contextlib.suppress(FabricError):
                    stream.cancel()

    # ── told by the task that reads ───────────────────────────────────────────────────────────────────────────────────

    def arrived(self, stream: AnswerStream, delta: Delta) -> None:
        if not self._first_ns:
            self._first_ns = time.monotonic_ns()
        if not self._streamed or self.error is not None:
            return
        events = self._wording.delta(self._positions[stream], delta)
        if events:
            if not self._response.started:
                self._response.start_events()
            self._response.write(events)
            if self._response.overflowed:
                self.broke(QuotaExceededError(f"{UNSENT_BYTES_MAX} bytes were not read", limit=UNSENT_BYTES_MAX))

    def ended(self, stream: AnswerStream) -> None:
        try:
            self._completions[self._positions[stream]] = stream.completion()
        except FabricError as error:
            self.broke(error)
            return
        self._left -= 1
        if not self._left and self.error is None:
            call, now_ns = self._call, time.monotonic_ns()
            call.figures.answered(call.model, call.begun_ns, self._first_ns or now_ns, now_ns, self.completions())
            if self._streamed:
                if not self._response.started:
                    self._response.start_events()
                self._response.write(self._wording.ending(self.completions()), more=False)
            self._finish()

    def broke(self, error: FabricError) -> None:
        """One error ends the whole answer: nobody can use the half of it."""
        if self.error is not None:
            return
        self.error = self._call.broke = error
        self.cancel()
        if self._streamed and self._response.started:
            self._response.write(self._wording.failure(error), more=False)
        self._finish()

    def _finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
