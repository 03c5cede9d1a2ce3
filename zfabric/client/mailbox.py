"""Where chunks of one answer go: into the answer as far as it is known, and, for a reader, into what waits to be read.

Everything here takes time in proportion to what arrived, however late it is read and however many choices there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from zfabric.client.results import Choice, Completion
from zfabric.errors import FabricError, ProtocolError, RequestCancelledError
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.extra import merged
from zfabric.wire.payloads import Delta, TokenLogprobs, Usage
from zfabric.wire.tool_calls import joined_calls

T = TypeVar("T")


class Answer:
    """One request's answer: its choices as far as they are known, and how it ended.

    Args:
        choices: How many were asked for.
    """

    __slots__ = ("choices", "closed", "error", "extra", "finished", "outcome", "prompt_logprobs", "worker")

    def __init__(self, choices: int = 1) -> None:
        self.choices = [Choice(index) for index in range(choices)]
        self.finished = False
        self.error: FabricError | None = None
        self.outcome: Outcome | None = None
        self.worker: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.extra: dict[str, Any] = {}
        #: Whether its reader closed it before its end.
        self.closed = False

    @property
    def usage(self) -> Usage | None:
        """Known once the answer is whole."""
        return self.outcome.usage if self.outcome is not None else None

    def enter(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        """Add a chunk to its choice."""
        choice = self.choices[index]
        choice.extend(text, token_ids)
        if extra is not None:
            if extra.worker is not None:
                self.worker = extra.worker
            self._enter_parts(choice, extra)

    def _enter_parts(self, choice: Choice, parts: ChunkExtra | Delta) -> None:
        """Add what a chunk or a delta has beside text and tokens."""
        if parts.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = parts.finish_reason, parts.stop_reason
        if parts.logprobs is not None:
            if choice.logprobs is None:
                choice.logprobs = []
            choice.logprobs += parts.logprobs
        if parts.reasoning or parts.tool_calls:
            choice.extend_parts(parts.reasoning, parts.tool_calls or ())
        if parts.prompt_logprobs is not None:
            self.prompt_logprobs = parts.prompt_logprobs
        if parts.extra:
            self.extra = {**self.extra, **parts.extra}

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """The terminal."""
        self.finished, self.error, self.outcome = True, error, outcome

    def completion(self, request_id: str, model: str) -> Completion:
        """The whole answer, once it was read to its end.

        Raises:
            FabricError: It ended with an error, or was closed before its end.
        """
        if self.error is not None:
            raise self.error
        if self.outcome is None or self.closed:
            raise RequestCancelledError("the answer was closed before its end")
        return Completion(
            request_id, model, self.worker, self.choices, self.usage or Usage(), self.prompt_logprobs, self.extra
        )


class Collector(Answer):
    """The sink of a request whose caller wants the whole answer.

    Args:
        done: Called once, at the end.
        consumed: Told of units as they arrive: nothing waits here for a reader.
    """

    __slots__ = ("_consumed", "_done")

    def __init__(self, choices: int, done: Callable[[], None], consumed: Callable[[int], None]) -> None:
        super().__init__(choices)
        self._done = done
        self._consumed = consumed

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        if index:
            _check_index(index, len(self.choices))
        self.enter(index, text, token_ids, extra)
        self._consumed(_units(token_ids, extra))

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        self._done()


class Mailbox(Answer):
    """The sink of one request, for one reader. What waits is deltas, the last of which grows, so a late reader gets merged ones.

    Args:
        wake: Called when something waits that did not, and at the end; the reader's own way of being woken.
    """

    __slots__ = ("_bare", "_growing", "_grown", "_reasoning", "_rich", "_texts", "units_taken", "waiting", "wake")

    def __init__(self, wake: Callable[[], None], choices: int = 1) -> None:
        super().__init__(choices)
        self.wake = wake
        self.waiting: deque[Delta] = deque()
        #: The last that waits, if any does.
        self._growing: Delta | None = None
        #: Whether it has grown; its texts are joined when it is taken, or another begins.
        self._grown = False
        #: Of deltas that wait and are not as many units as tokens: the difference, by the delta's identity.
        self._bare: dict[int, int] = {}
        #: Whether any delta had more than text and tokens.
        self._rich = False
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self.units_taken = 0

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        if index:
            _check_index(index, len(self.choices))
        delta = self._growing
        if delta is None or delta.index != index:
            if self._grown:
                self._join()
            delta = self._growing = Delta(text=text, token_ids=token_ids, index=index)
            self._put(delta)
            if extra is None and token_ids:
                # The usual case.
                return
            if extra is not None:
                self._add_extra(delta, extra)
        else:
            self._grow(delta, text, token_ids, extra)
        bare = _units(token_ids, extra) - len(token_ids)
        if bare:
            self._bare[id(delta)] = self._bare.get(id(delta), 0) + bare

    def _put(self, delta: Delta) -> None:
        """A delta begins to wait."""
        self.waiting.append(delta)
        if len(self.waiting) == 1:
            self.wake()

    def _grow(self, delta: Delta, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None:
        """Add a chunk to the delta that waits already."""
        if not self._grown:
            self._grown = True
            self._texts, self._reasoning = [delta.text], [delta.reasoning]
        self._texts.append(text)
        delta.token_ids += token_ids
        if extra is not None:
            self._reasoning.append(extra.reasoning)
            self._add_extra(delta, extra)

    def _add_extra(self, delta: Delta, extra: ChunkExtra) -> None:
        if extra.worker is not None:
            self.worker = extra.worker
        if extra.plain:
            return
        self._rich = True
        if extra.finish_reason is not None:
            delta.finish_reason, delta.stop_reason = extra.finish_reason, extra.stop_reason
        delta.prompt_logprobs = extra.prompt_logprobs or delta.prompt_logprobs
        delta.reasoning = delta.reasoning or extra.reasoning
        delta.extra = merged(delta.extra, extra.extra)
        if extra.logprobs:
            delta.logprobs = _extended(delta.logprobs, extra.logprobs)
        if extra.tool_calls:
            delta.tool_calls = _extended(delta.tool_calls, extra.tool_calls)

    def _join(self) -> None:
        """Write the parts of the last delta that waits into it."""
        delta = self._growing
        assert delta is not None
        delta.text, delta.reasoning = "".join(self._texts), "".join(self._reasoning)
        if delta.tool_calls:
            delta.tool_calls = joined_calls(delta.tool_calls)
        self._grown = False
        self._texts, self._reasoning = [], []

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        self.wake()

    def take(self) -> Delta:
        """The next delta, entered in the answer. Call only if something waits."""
        delta = self.waiting.popleft()
        self.units_taken = self.read(delta)
        return delta

    def read(self, delta: Delta) -> int:
        """Enter a delta that has waited in the answer. Returns its units."""
        if delta is self._growing:
            if self._grown:
                self._join()
            self._growing = None
        token_ids = delta.token_ids
        choice = self.choices[delta.index]
        choice.extend(delta.text, token_ids)
        if self._rich:
            self._enter_parts(choice, delta)
        return len(token_ids) + self._bare.pop(id(delta), 0) if self._bare else len(token_ids)

    def discard(self) -> None:
        """Forget what has arrived and was not read; reading on finds the end."""
        self.closed = self.closed or self._growing is not None or not self.finished
        self.waiting.clear()
        self._bare.clear()
        self._growing = None
        self._grown = False
        if isinstance(self.error, RequestCancelledError):
            self.error = None


def _units(token_ids: list[int], extra: ChunkExtra | None) -> int:
    return (len(token_ids) or 1) if extra is None or extra.units is None else extra.units


def _extended(so_far: list[T] | None, more: list[T]) -> list[T]:
    """A list with more in it: the former one, so that a late reader's costs no more than it is long."""
    if so_far is None:
        return more
    so_far += more
    return so_far


def _check_index(index: int, choices: int) -> None:
    if not 0 <= index < choices:
        raise ProtocolError(f"a chunk is of choice {index}, of {choices}", index=index, choices=choices)
