"""How many tokens of prompts go along in a step of the running streams, where both are one pass.

Such a pass takes as long as a step does without prompts, and so much more for each token of theirs. Both are learnt from the
times of passes, so the streams' gaps grow by a share of a step and no more, however fast the device is. Where more requests
wait for their first token than streams run, gaps grow by as many times more: else a few that came first would run nearly alone,
and all others wait for them.
"""

from __future__ import annotations

from typing import Final

#: A step with prompts may take so much longer than one without, as a share of it. At one, a prompt would double every gap;
#: at much less, passes would be many, and each reads all weights.
_SHARE: Final = 0.75
#: So many tokens go along however long they take: a prompt of 2,000 tokens is computed in 250 steps at the latest.
_TOKENS_MIN: Final = 8
#: Until anything is known. A CPU computes so many in the time of a step, and a device far more, which is soon found.
_TOKENS_FIRST: Final = 16
#: Share of the newest pass in what is known, and by how much of that it moves at most: a machine that is busy holds passes up,
#: and what is learnt has to be nearer to the usual one than to the mean.
_NEWEST: Final = 0.5
_MOVED_MAX: Final = 0.15
#: The same for a step without prompts after many with them: what was known before is old.
_MOVED_MAX_OLD: Final = 0.5
#: A pass takes no more tokens than so many times the pass before had: what few of them cost says little about many.
_GROWTH_MAX: Final = 2
#: After so many passes with prompts one goes without, so that it is known how long that takes now: streams come and go.
_PLAIN_EVERY: Final = 16


class PromptShare:
    """Keeps a step with prompts within 1.75 times the time of one without, while no more requests wait than run.

    Args:
        tokens_max: Prompt tokens of a pass at most.
        wait_s: So long running streams wait for them then at most, in seconds.

    Example:
        share = PromptShare(512, 0.1)
        share.stepped(0.010)
        share.mixed(64, 0.015)
        share.tokens(running=4, waiting=1)
    """

    def __init__(self, tokens_max: int, wait_s: float) -> None:
        self._tokens_max, self._wait_s = tokens_max, wait_s
        #: Seconds of a step without prompts, and of each of their tokens.
        self._step_s = self._token_s = 0.0
        self._latest = min(tokens_max, _TOKENS_FIRST)
        #: Passes with prompts since one was without.
        self._mixed = 0

    def tokens(self, *, running: int, waiting: int) -> int:
        """How many the next pass may have: now and then none.

        Args:
            running: Streams that are stepped in it. Without any, nobody waits for prompts.
            waiting: Requests that have no token yet, and could be computed.
        """
        if not running:
            return self._tokens_max
        if self._mixed >= _PLAIN_EVERY:
            return 0
        if not self._token_s:
            return self._latest
        wished = max(1, waiting / running) * min(self._wait_s, _SHARE * self._step_s) / self._token_s
        wished = min(wished, _GROWTH_MAX * self._latest)
        return min(self._tokens_max, max(_TOKENS_MIN, int(wished)))

    def stepped(self, seconds: float) -> None:
        """A step without prompts took so long."""
        moved_max = _MOVED_MAX_OLD if self._mixed >= _PLAIN_EVERY else _MOVED_MAX
        self._mixed = 0
        self._step_s = _moved(self._step_s, seconds, moved_max) if self._step_s else seconds

    def mixed(self, tokens: int, seconds: float) -> None:
        """A step took so long with so many tokens of prompts."""
        self._mixed += 1
        self._latest = max(_TOKENS_MIN, tokens, self._latest // _GROWTH_MAX)
        if not self._step_s:
            self._step_s = seconds / (1 + _SHARE)
        # They are not for nothing, whatever the clock says.
        found = max(seconds - self._step_s, seconds / 100) / tokens
        if not self._token_s:
            self._token_s = found
        elif tokens >= _TOKENS_MIN:
            # The end of a prompt says little of what a token costs.
            self._token_s = _moved(self._token_s, found, _MOVED_MAX)


def _moved(known: float, found: float, most: float) -> float:
    """What is known after something was found: half of the way, and not far."""
    return known + min(most * known, max(-most * known, _NEWEST * (found - known)))
