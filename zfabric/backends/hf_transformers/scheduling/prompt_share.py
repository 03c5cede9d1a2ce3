"""How many tokens of prompts go along in a pass.

Where streams run, a pass with prompts takes longer than a step without by so much for each token of theirs. Both are learnt from
the times of passes, so the streams' gaps grow by a share of a step and no more, however fast the device is. Where more requests
wait for their first token than streams run, gaps grow by as many times more: else a few that came first would run nearly alone,
and all others wait for them. Where nothing runs, prompts that are short share a pass.
"""

from __future__ import annotations

from typing import Final

from zfabric.backends.hf_transformers.scheduling.pass_times import PassTimes

#: A step with prompts may take so much longer than one without, as a share of it. At one, a prompt would double every gap;
#: at much less, passes would be many, and each reads all weights.
_SHARE: Final = 0.75
#: So many tokens go along however long they take: a prompt of 2,000 tokens is computed in 250 steps at the latest.
_TOKENS_MIN: Final = 8
#: Until anything is known. A CPU computes so many in the time of a step, and a device far more, which is soon found.
_TOKENS_FIRST: Final = 16
#: A pass takes no more tokens than so many times the most that one had which took no longer than was expected: what few of them
#: cost says little about many.
_GROWTH_MAX: Final = 2
#: Times what was expected: a pass that took longer shows that no more is known than of such passes.
_LATE: Final = 2.0
#: After so many passes with prompts one goes without: which part of their time is whose is told by passes that differ.
_PLAIN_EVERY: Final = 8
#: Where nothing runs, as many tokens as of so many parts go along: requests that come together then run together, and a
#: device that is not filled by one part is. Later ones wait for them, so there is an end to it.
_IDLE_PARTS: Final = 4


class PromptShare:
    """Keeps a step with prompts within 1.75 times the time of one without, while no more requests wait than run.

    Args:
        part_max: Tokens of one prompt in a pass at most, and of all where streams run.
        wait_s: So long running streams wait for them then at most, in seconds.

    Example:
        share = PromptShare(512, 0.1)
        share.passed(rows=4, tokens=0, seconds=0.010)
        share.passed(rows=4, tokens=64, seconds=0.015)
        share.tokens(running=4, waiting=1)
    """

    def __init__(self, part_max: int, wait_s: float) -> None:
        self.part_max, self._wait_s = part_max, wait_s
        self._times = PassTimes()
        #: Tokens of the largest pass whose time is understood.
        self._most = _TOKENS_FIRST
        #: Passes with prompts since one was without.
        self._mixed = 0

    def tokens(self, *, running: int, waiting: int) -> int:
        """How many the next pass may have: now and then none.

        Args:
            running: Streams that are stepped in it. Without any, nobody waits for prompts.
            waiting: Requests that have no token yet, and could be computed.
        """
        if not running:
            return _IDLE_PARTS * self.part_max
        if self._mixed >= _PLAIN_EVERY:
            return 0
        token_s, step_s = self._times.token_s, self._times.seconds(running, 0)
        wished = _GROWTH_MAX * self._most if token_s else self._most
        bound_s = max(1, waiting / running) * min(self._wait_s, _SHARE * step_s)
        if bound_s < wished * token_s:
            wished = int(bound_s / token_s)
        return min(self.part_max, max(_TOKENS_MIN, wished))

    def passed(self, *, rows: int, tokens: int, seconds: float) -> None:
        """A pass took so long.

        Args:
            rows: Tokens of streams that were stepped in it, guessed ones as well.
            tokens: Of prompts.
        """
        expected = self._times.seconds(rows, tokens)
        self._times.passed(rows, tokens, seconds)
        self._mixed = self._mixed + 1 if rows and tokens else 0
        if tokens:
            late = 0.0 < _LATE * expected < seconds
            self._most = max(_TOKENS_MIN, tokens if late else max(self._most, tokens))
