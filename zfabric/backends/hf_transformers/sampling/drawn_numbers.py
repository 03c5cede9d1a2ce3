"""The random numbers of a batch: for some steps at once, since that takes hardly longer than those of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import array_on, tensor_on
from zfabric.backends.hf_transformers.sampling.random_numbers import seed_state, uniform, uniform_on_host

_STEPS: Final = 16
#: Rows that the host computes numbers of: more of them are quicker where the others are.
_ADDED_MAX: Final = 8


class DrawnNumbers:
    """Numbers of rows for their next draws, and for those that follow on these.

    Args:
        rows: Those that are drawn, in the order of the draws.
        positions: Of the tokens that are drawn next.
        states: Of the rows' seeds, on the device.
        begin: The positions, there.
        former: Numbers of the batch before this one: those of rows that stay are taken over, and those of the others are
            computed on the host, which takes less time while they are few.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        positions: list[int],
        states: torch.Tensor,
        begin: torch.Tensor,
        former: DrawnNumbers | None = None,
    ) -> None:
        self._rows, self._states = rows, states
        self._positions, self._begin = positions, begin
        #: Of the steps whose numbers are here, the one in use, and the one that `_begin` is of.
        self._step = self._origin = 0
        if former is None or not self._take_over(former):
            self._compute()

    @property
    def next(self) -> torch.Tensor:
        """Those of the next draws, float64 (rows,)."""
        return self._numbers[self._step]

    def move(self, positions: list[int]) -> None:
        """Be as the next draws need it."""
        step = positions[0] - self._positions[0]
        if [position - step for position in positions] != self._positions:
            self._begin = tensor_on(self._begin.device, positions)
        elif 0 <= step < _STEPS:
            self._step = step
            return
        else:
            self._begin = self._begin + (step - self._origin)
        self._positions, self._step, self._origin = positions, 0, 0
        self._compute()

    def _compute(self) -> None:
        ahead = torch.arange(_STEPS, device=self._begin.device).unsqueeze(1)
        self._numbers = uniform(self._states, self._begin + ahead)

    def _take_over(self, former: DrawnNumbers) -> bool:
        """Whether numbers of some rows were there: all that are have to be as far as one another."""
        known = {row: place for place, row in enumerate(former._rows)}
        own = set(self._rows)
        if len(known) < len(former._rows) or len(own) < len(self._rows) or not known.keys() & own:
            return False
        added = [place for place, row in enumerate(self._rows) if row not in known]
        pairs = [
            (position, known[row]) for row, position in zip(self._rows, self._positions, strict=True) if row in known
        ]
        steps = {position - former._positions[place] for position, place in pairs}
        step = steps.pop()
        if steps or not 0 <= step < _STEPS or len(added) > _ADDED_MAX:
            return False
        self._positions = [position - step for position in self._positions]
        numbers, places = former._numbers, [known.get(row, -1) for row in self._rows]
        if added:
            rows = [self._rows[place] for place in added]
            begins = [self._positions[place] for place in added]
            device = self._begin.device
            more = uniform_on_host([seed_state(row.seed) for row in rows], begins, _STEPS)
            numbers = torch.cat([numbers, array_on(device, more)], dim=1)
            for number, place in enumerate(added):
                places[place] = len(known) + number
        if places != list(range(numbers.shape[1])):
            numbers = numbers.index_select(1, tensor_on(self._begin.device, places))
        self._numbers, self._step, self._origin = numbers, step, step
        return True
