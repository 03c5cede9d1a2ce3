"""How much of a prompt is computed between two steps of the running streams, where it has passes of its own.

Those are prompts of padded rows and of beam searches, and texts for vectors; `prompt_share` is for what goes along in a step.
"""

from __future__ import annotations

from typing import Final

#: No part is smaller: reading the weights for it would cost more than computing it, many times over.
_TOKENS_MIN: Final = 16
#: A part may take as long as so many steps in any case. A pass takes a step's time however few tokens it has, so at
#: three, two thirds of the time go into tokens; at one, the prompt would hardly move.
_STEPS_MIN: Final = 3
#: Share of the newest step in the mean.
_NEWEST: Final = 0.2


class TokenBudget:
    """Keeps the wait of running streams near a wished time, by the time that former parts took.

    Args:
        tokens_max: At most so many at a time.
        wait_s: How long running streams may wait for a part of a new prompt, in seconds.
    """

    def __init__(self, tokens_max: int, wait_s: float) -> None:
        self.tokens_max = tokens_max
        self.wait_s = wait_s
        self._step_s = 0.0
        self._tokens = float(min(tokens_max, 4 * _TOKENS_MIN))

    def budget(self, *, running: bool) -> int:
        """Tokens to compute now."""
        return int(self._tokens) if running else self.tokens_max

    def stepped(self, seconds: float) -> None:
        """A step of the batch took so long."""
        self._step_s += (seconds - self._step_s) * (_NEWEST if self._step_s else 1.0)

    def took(self, tokens: int, seconds: float) -> None:
        """So many prompt tokens took so long, while streams were waiting."""
        wished_s = max(self.wait_s, _STEPS_MIN * self._step_s)
        if tokens < self._tokens / 2 and seconds < wished_s:
            return  # The end of a prompt says little about a whole part.
        change = min(2.0, max(0.5, wished_s / max(seconds, 1e-9)))
        least = float(min(_TOKENS_MIN, self.tokens_max))
        self._tokens = min(float(self.tokens_max), max(least, self._tokens * change))
