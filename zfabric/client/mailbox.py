"""Where chunks of one answer wait for their reader: one slot whose content grows, so a late reader gets merged deltas."""

from __future__ import annotations

from collections.abc import Callable

from zfabric.client.results import Choice, Completion
from zfabric.errors import FabricError
from zfabric.wire.payloads import Chunk, Delta, Outcome, TokenLogprobs, Usage


class Mailbox:
    """The sink of one request, for one reader.

    Args:
        wake: Called after anything arrived; the reader's own way of being woken.
    """

    __slots__ = (
        "choices",
        "error",
        "finished",
        "outcome",
        "prompt_logprobs",
        "units_taken",
        "waiting",
        "wake",
        "worker",
    )

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.waiting: list[Chunk] = []
        self.finished = False
        self.error: FabricError | None = None
        self.outcome: Outcome | None = None
        self.worker: str | None = None
        self.choices: dict[int, Choice] = {}
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.units_taken = 0

    def arrived(self, chunk: Chunk) -> None:
        self.waiting.append(chunk)
        if chunk.extra is not None and chunk.extra.worker is not None:
            self.worker = chunk.extra.worker
        self.wake()

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        self.finished = True
        self.error = error
        self.outcome = outcome
        self.wake()

    @property
    def usage(self) -> Usage | None:
        """Known once the answer is whole."""
        return self.outcome.usage if self.outcome is not None else None

    def take(self) -> Delta:
        """Everything that waits for the next choice, as one delta. Call only if something waits."""
        waiting = self.waiting
        first = waiting[0]
        if len(waiting) == 1:
            self.waiting = []
            choice = self.choices.get(first.index)
            if choice is None or first.extra is not None:
                return self._delta(waiting)
            # The usual case, a step's one token, without what only runs and a choice's ends need.
            self.units_taken = len(first.token_ids) or 1
            choice.extend(first.text, first.token_ids)
            return Delta(text=first.text, token_ids=first.token_ids, index=first.index)
        count = 1
        while count < len(waiting) and waiting[count].index == first.index:
            count += 1
        self.waiting = waiting[count:]
        return self._delta(waiting[:count])

    def _delta(self, run: list[Chunk]) -> Delta:
        """One delta of a run of chunks of one choice, entered in the accumulated choice."""
        first = run[0]
        choice = self.choices.get(first.index)
        if choice is None:
            choice = self.choices[first.index] = Choice(first.index)
        if len(run) == 1:
            delta = Delta(text=first.text, token_ids=first.token_ids, index=first.index)
        else:
            text = "".join([chunk.text for chunk in run])
            delta = Delta(text=text, token_ids=[t for chunk in run for t in chunk.token_ids], index=first.index)
        units = 0
        for chunk in run:
            extra = chunk.extra
            units += (len(chunk.token_ids) or 1) if extra is None or extra.units is None else extra.units
            if extra is not None:
                if extra.finish_reason is not None:
                    delta.finish_reason = choice.finish_reason = extra.finish_reason
                if extra.logprobs is not None:
                    delta.logprobs = [*(delta.logprobs or ()), *extra.logprobs]
                if extra.prompt_logprobs is not None:
                    delta.prompt_logprobs = self.prompt_logprobs = extra.prompt_logprobs
        self.units_taken = units
        choice.extend(delta.text, delta.token_ids)
        if delta.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or ()), *delta.logprobs]
        return delta

    def completion(self, request_id: str, model: str) -> Completion:
        """The whole answer, once it has ended well and all was taken."""
        choices = [self.choices[index] for index in sorted(self.choices)] or [Choice(0)]
        return Completion(request_id, model, self.worker, choices, self.usage or Usage(), self.prompt_logprobs)
