"""The parameters of a batch as tensors on the device, which stay as they are for as long as the rows do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import column_on, tensor_on
from zfabric.backends.hf_transformers.sampling.logits_processors import LogitsProcessors
from zfabric.backends.hf_transformers.sampling.random_numbers import seed_state, uniform
from zfabric.backends.hf_transformers.sampling.token_histories import TokenHistories
from zfabric.wire.sampling import SamplingParams

#: Steps whose numbers are computed at once: it takes hardly longer than those of one step, and the others then take nothing.
_NUMBERS_AHEAD = 16
#: A top-p that cuts nothing off, whatever the rounding.
_ALL: float = 2.0


@dataclass(frozen=True, slots=True)
class Warpers:
    """Which candidates stay, for rows of which each wants some cut off; a bound is None where no row has it.

    Attributes:
        params: As the host knows them.
        most: No row has more candidates than so many; None if one may have any number.
        top_k: int64 (rows, 1), more than any vocabulary has where a row has none.
        limited: bool (rows, 1), where a row has a top-k.
        top_p, min_p: float32 (rows, 1).
        typical: The rows that have a typical-p, int64; None for all.
        typical_p: float32 (those rows, 1).
    """

    params: Sequence[SamplingParams]
    most: int | None
    top_k: torch.Tensor | None
    limited: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    typical: torch.Tensor | None
    typical_p: torch.Tensor | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Warpers:
        """Those of these rows."""
        top_k = limited = top_p = min_p = typical_p = None
        if any(p.top_k > 0 for p in params):
            none = torch.iinfo(torch.long).max
            top_k = tensor_on(device, [p.top_k if p.top_k > 0 else none for p in params]).unsqueeze(1)
            limited = top_k < none
        if any(p.top_p < 1 for p in params):
            top_p = column_on(device, [p.top_p if p.top_p < 1 else _ALL for p in params])
        if any(p.min_p > 0 for p in params):
            min_p = column_on(device, [p.min_p for p in params])
        places = [index for index, p in enumerate(params) if p.typical_p < 1]
        if places:
            typical_p = column_on(device, [params[index].typical_p for index in places])
        typical = tensor_on(device, places) if 0 < len(places) < len(params) else None
        most = max(p.top_k for p in params) if all(p.top_k > 0 for p in params) else None
        return cls(params, most, top_k, limited, top_p, min_p, typical, typical_p)


class SamplingMetadata:
    """What drawing needs of a batch.

    Args:
        rows: In the order of the logits; one may come several times.
        positions: Of the tokens that are drawn next.
        histories: Of the logits' device and vocabulary.

    Attributes:
        processors: What changes the logits; None if nothing does.
        told: Rows whose log-probabilities are wanted, int64; None for all or none.
        told_places: The same, for the host.
        alternatives: How many each row wants to be told.
        greedy: Whether no row is drawn.
        drawn: Rows that are drawn, int64; None for all.
        numbers: What they are drawn by at the next step, float64 (drawn,).
        temperature: Of drawn rows, float32 (drawn, 1); None if all are 1.
        warped, unwarped: Which of the drawn rows have warpers and which have not, int64; None for all or none.
        warpers: Of the warped rows; None if there are none.
    """

    def __init__(self, rows: list[Row], positions: list[int], histories: TokenHistories) -> None:
        device = histories.device
        self._rows, self._positions = rows, positions
        self.processors: LogitsProcessors | None = None
        if not all(row.plain for row in rows):
            self.processors = LogitsProcessors(rows, positions, histories)
        self.alternatives = [row.alternatives for row in rows]
        self.told_places = [index for index, count in enumerate(self.alternatives) if count is not None]
        self.told = _some(device, self.told_places, len(rows))
        self._drawn_places = [index for index, row in enumerate(rows) if not row.params.greedy]
        self.greedy = not self._drawn_places
        self.drawn = _some(device, self._drawn_places, len(rows))
        self.temperature: torch.Tensor | None = None
        self.warpers: Warpers | None = None
        if self.greedy:
            return
        drawn = [rows[index] for index in self._drawn_places]
        if any(row.params.temperature != 1 for row in drawn):
            self.temperature = column_on(device, [row.params.temperature for row in drawn])
        self._states = tensor_on(device, [seed_state(row.seed) for row in drawn])
        self._begin = tensor_on(device, [positions[index] for index in self._drawn_places])
        self._compute_numbers()
        warped = [index for index, row in enumerate(drawn) if row.warps]
        self.warped = _some(device, warped, len(drawn))
        self.unwarped = _some(device, [index for index, row in enumerate(drawn) if not row.warps], len(drawn))
        if warped:
            self.warpers = Warpers.of([drawn[index].params for index in warped], device)

    def of(self, rows: list[Row]) -> bool:
        """Whether these are its rows."""
        return rows == self._rows

    def move(self, positions: list[int]) -> None:
        """Be as the next draws need it, of the same rows."""
        if self.processors is not None:
            self.processors.move(positions)
        if self.greedy:
            return
        step = positions[0] - self._positions[0]
        if [position - step for position in positions] != self._positions:
            self._begin = tensor_on(self._begin.device, [positions[index] for index in self._drawn_places])
        elif 0 <= step < _NUMBERS_AHEAD:
            self.numbers = self._numbers[step]
            return
        else:
            self._begin = self._begin + step
        self._positions = positions
        self._compute_numbers()

    def _compute_numbers(self) -> None:
        """Those of the next draws, float64 (drawn,), and of some that follow on them."""
        ahead = torch.arange(_NUMBERS_AHEAD, device=self._begin.device).unsqueeze(1)
        self._numbers = uniform(self._states, self._begin + ahead)
        self.numbers = self._numbers[0]


def _some(device: torch.device, places: list[int], rows: int) -> torch.Tensor | None:
    """These as an index; None if they are all or none."""
    return tensor_on(device, places) if 0 < len(places) < rows else None
