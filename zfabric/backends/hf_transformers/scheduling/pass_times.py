"""How long a pass takes, learnt from those that were: so much in any case, and so much for each row and each token of a prompt.

A step of two rows says little of one of twenty, and rows join and leave all the time. So the parts are learnt together, from
passes of all kinds: by a Kalman filter (Kalman 1960) of three states that drift, which takes what is far from what it expects for
less certain, as an estimator by Huber (1964) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: Rows and tokens that are one unit: so many cost about what a pass does in any case, which keeps the filter's numbers alike.
_ROWS_UNIT: Final = 16
_TOKENS_UNIT: Final = 64
#: By what share passes alike differ.
_NOISE: Final = 0.1
#: By what share each part changes from pass to pass: texts grow, other work comes to the machine. A token of a prompt costs more
#: the farther on it is, while steps change little: were both as uncertain, half of what prompts come to cost would be taken for
#: the step's, and a share of that be given to prompts in turn.
_DRIFTS: Final = (0.03, 0.03, 0.1)
#: A part that no pass tells of is taken to be uncertain by such a share and no more: else one odd pass would settle it anew.
_UNCERTAIN_MAX: Final = 0.5
#: What is farther off than so many standard deviations is believed the less the farther it is: a busy machine holds passes up,
#: and what is learnt has to be nearer to the usual one than to the mean.
_SURPRISE_MAX: Final = 2.0


class PassTimes:
    """Seconds of a pass by what is in it.

    Example:
        times = PassTimes()
        times.passed(8, 0, 0.040)
        times.passed(0, 512, 0.700)
        times.seconds(8, 32)
    """

    def __init__(self) -> None:
        #: Seconds in any case, of a unit of rows, of a unit of tokens; and the covariance of what is not known of them.
        self._parts = [0.0, 0.0, 0.0]
        self._covariance: list[list[float]] = []

    def seconds(self, rows: int, tokens: int) -> float:
        """What is to be expected of a pass with so many rows and tokens of prompts."""
        each, row, token = self._parts
        return each + row * rows / _ROWS_UNIT + token * tokens / _TOKENS_UNIT

    @property
    def token_s(self) -> float:
        """Of a token of a prompt, in seconds; zero as long as nothing is known."""
        return self._parts[2] / _TOKENS_UNIT

    def passed(self, rows: int, tokens: int, seconds: float) -> None:
        """A pass took so long."""
        if not self._covariance:
            self._covariance = [[seconds**2 if row == column else 0.0 for column in range(3)] for row in range(3)]
        self._drift()
        there = (1.0, rows / _ROWS_UNIT, tokens / _TOKENS_UNIT)
        together = [_product(line, there) for line in self._covariance]
        expected, known = self.seconds(rows, tokens), _product(together, there)
        surprise, noise = seconds - expected, (_NOISE * (expected or seconds)) ** 2
        variance = known + noise * max(1.0, abs(surprise) / (_SURPRISE_MAX * (known + noise) ** 0.5))
        for index, its in enumerate(together):
            gain = its / variance
            self._parts[index] = max(0.0, self._parts[index] + gain * surprise)
            line = self._covariance[index]
            self._covariance[index] = [one - gain * other for one, other in zip(line, together, strict=True)]

    def _drift(self) -> None:
        """What was known is a pass older."""
        for index, part in enumerate(self._parts):
            variance = self._covariance[index][index]
            most = (_UNCERTAIN_MAX * part) ** 2
            if variance < most:
                self._covariance[index][index] = min(most, variance + (_DRIFTS[index] * part) ** 2)


def _product(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(map(float.__mul__, left, right))
