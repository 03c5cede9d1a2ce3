"""Of several choices that were drawn, the likeliest are given: `best_of`."""

from __future__ import annotations

from zfabric.wire.extra import merged
from zfabric.wire.payloads import Delta
from zfabric.wire.tool_calls import joined_calls


class BestOf:
    """Holds back all choices of a request until the last has ended.

    Args:
        given: How many of them are given, likeliest first.
        drawn: How many there are.
        show_logprobs: Whether the caller asked for the log-probabilities that decide it.
    """

    def __init__(self, given: int, drawn: int, *, show_logprobs: bool) -> None:
        self._given = given
        self._show_logprobs = show_logprobs
        self._choices = [Delta(index=index, logprobs=[]) for index in range(drawn)]
        self._prompt: Delta | None = None

    def add(self, delta: Delta) -> list[Delta]:
        """Enter a delta, with its log-probabilities. Returns what is to be given out: nothing until all have ended."""
        choice = self._choices[delta.index]
        choice.text += delta.text
        choice.reasoning += delta.reasoning
        choice.tool_calls = joined_calls([*(choice.tool_calls or ()), *(delta.tool_calls or ())])
        choice.token_ids = [*choice.token_ids, *delta.token_ids]
        choice.logprobs = [*(choice.logprobs or ()), *(delta.logprobs or ())]
        choice.extra = merged(choice.extra, delta.extra)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.prompt_logprobs is not None:
            self._prompt = delta
        return self._end(delta) if delta.usage is not None else []

    def _end(self, last: Delta) -> list[Delta]:
        winners = sorted(self._choices, key=_likelihood, reverse=True)[: self._given]
        for index, winner in enumerate(winners):
            winner.index = index
            if not self._show_logprobs:
                winner.logprobs = None
        winners[0].prompt_logprobs = None if self._prompt is None else self._prompt.prompt_logprobs
        winners[-1].usage = last.usage
        return winners


def _likelihood(choice: Delta) -> float:
    return sum(entry.token.logprob for entry in choice.logprobs or ())
