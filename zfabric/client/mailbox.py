"""Where chunks of one answer go: into the answer as far as it is known, and, for a reader, into what waits to be read.

Everything here takes time in proportion to what arrived, however late it is read and however many choices there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from zfabric.client.results import Choice, Completion
from zfabric.errors import FabricError, ProtocolError, RequestCancelledError
from zfabric.wire.payloads import Chunk, ChunkExtra, Delta, Outcome, TokenLogprobs, Usage
from zfabric.wire.tool_calls import ToolCallDelta, joined_calls


class Answer:
    """One request's answer: its choices as far as they are known, and how it ended.

    Args:
        choices: How many were asked for.
    """

    __slots__ = ("choices", "closed", "error", "finished", "outcome", "prompt_logprobs", "worker")

    def __init__(self, choices: int = 1) -> None:
        self.choices = [Choice(index) for index in range(choices)]
        self.finished = False
        self.error: FabricError | None = None
        self.outcome: Outcome | None = None
        self.worker: str | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        #: Whether its reader closed it before its end.
        self.closed = False

    @property
    def usage(self) -> Usage | None:
        """Known once the answer is whole."""
        return self.outcome.usage if self.outcome is not None else None

    def enter(self, chunk: Chunk) -> None:
        """Add a chunk to its choice."""
        choice = self.choices[chunk.index]
        choice.extend(chunk.text, chunk.token_ids)
        if chunk.extra is not None:
            self._enter_extra(choice, chunk.extra)

    def _enter_extra(self, choice: Choice, extra: ChunkExtra) -> None:
        if extra.worker is not None:
            self.worker = extra.worker
        if extra.finish_reason is not None:
            choice.finish_reason = extra.finish_reason
        if extra.logprobs is not None:
            if choice.logprobs is None:
                choice.logprobs = []
            choice.logprobs += extra.logprobs
        if extra.reasoning or extra.tool_calls:
            choice.extend_parts(extra.reasoning, extra.tool_calls or ())
        if extra.prompt_logprobs is not None:
            self.prompt_logprobs = extra.prompt_logprobs

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
        return Completion(request_id, model, self.worker, self.choices, self.usage or Usage(), self.prompt_logprobs)


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

    def arrived(self, chunk: Chunk) -> None:
        if chunk.index:
            _check_index(chunk, len(self.choices))
        self.enter(chunk)
        self._consumed(_units(chunk))

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        self._done()


class Mailbox(Answer):
    """The sink of one request, for one reader: one slot whose content grows, so a late reader gets merged deltas.

    Args:
        wake: Called after anything arrived; the reader's own way of being woken.
    """

    __slots__ = ("units_taken", "waiting", "wake")

    def __init__(self, wake: Callable[[], None], choices: int = 1) -> None:
        super().__init__(choices)
        self.wake = wake
        self.waiting: deque[Chunk] = deque()
        self.units_taken = 0

    def arrived(self, chunk: Chunk) -> None:
        if chunk.index:
            _check_index(chunk, len(self.choices))
        self.waiting.append(chunk)
        if chunk.extra is not None and chunk.extra.worker is not None:
            self.worker = chunk.extra.worker
        self.wake()

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        self.wake()

    def take(self) -> Delta:
        """What waits for the next choice, up to the next chunk of another, as one delta. Call only if something waits."""
        waiting = self.waiting
        first = waiting.popleft()
        if first.extra is None and not (waiting and waiting[0].index == first.index):
            # The usual case, a step's one token, without what only runs and a choice's ends need.
            self.units_taken = len(first.token_ids) or 1
            self.choices[first.index].extend(first.text, first.token_ids)
            return Delta(text=first.text, token_ids=first.token_ids, index=first.index)
        run = [first]
        while waiting and waiting[0].index == first.index:
            run.append(waiting.popleft())
        return self._delta(run)

    def _delta(self, run: list[Chunk]) -> Delta:
        """One delta of a run of chunks of one choice, entered in the answer."""
        first = run[0]
        if len(run) == 1:
            delta = Delta(text=first.text, token_ids=first.token_ids, index=first.index)
        else:
            text = "".join([chunk.text for chunk in run])
            delta = Delta(text=text, token_ids=[t for chunk in run for t in chunk.token_ids], index=first.index)
        choice = self.choices[first.index]
        choice.extend(delta.text, delta.token_ids)
        logprobs: list[TokenLogprobs] = []
        reasoning: list[str] = []
        calls: list[ToolCallDelta] = []
        for chunk in run:
            extra = chunk.extra
            if extra is None:
                continue
            self._enter_extra(choice, extra)
            logprobs += extra.logprobs or ()
            reasoning.append(extra.reasoning)
            calls += extra.tool_calls or ()
            delta.finish_reason = extra.finish_reason or delta.finish_reason
            delta.prompt_logprobs = extra.prompt_logprobs or delta.prompt_logprobs
        delta.logprobs = logprobs or None
        delta.reasoning, delta.tool_calls = "".join(reasoning), joined_calls(calls)
        self.units_taken = sum([_units(chunk) for chunk in run])
        return delta

    def discard(self) -> None:
        """Forget what has arrived and was not read; reading on finds the end."""
        self.closed = self.closed or bool(self.waiting) or not self.finished
        self.waiting.clear()
        if isinstance(self.error, RequestCancelledError):
            self.error = None


def _units(chunk: Chunk) -> int:
    extra = chunk.extra
    return (len(chunk.token_ids) or 1) if extra is None or extra.units is None else extra.units


def _check_index(chunk: Chunk, choices: int) -> None:
    if not 0 <= chunk.index < choices:
        raise ProtocolError(f"a chunk is of choice {chunk.index}, of {choices}", index=chunk.index, choices=choices)
