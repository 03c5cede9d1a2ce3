"""The parameters of a batch as tensors on the device, which stay as they are for as long as the rows do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on, tensors_on
from zfabric.backends.hf_transformers.sampling.drawn_numbers import DrawnNumbers
from zfabric.backends.hf_transformers.sampling.logits_processors import LogitsProcessors
from zfabric.backends.hf_transformers.sampling.row_lines import NO_TOP_K, Lines, lines_of, lines_on
from zfabric.backends.hf_transformers.sampling.token_histories import TokenHistories
from zfabric.wire.sampling import SamplingParams


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
    def of(cls, params: Sequence[SamplingParams], lines: Lines, typical: torch.Tensor | None = None) -> Warpers:
        """Those of rows with these parameters.

        Args:
            lines: The same on the device.
            typical: Which of them have a typical-p, if some have and others have not.
        """
        top_k = limited = top_p = min_p = typical_p = None
        if any(p.top_k > 0 for p in params):
            top_k = lines.top_k
            limited = top_k < NO_TOP_K
        if any(p.top_p < 1 for p in params):
            top_p = lines.top_p
        if any(p.min_p > 0 for p in params):
            min_p = lines.min_p
        if any(p.typical_p < 1 for p in params):
            typical_p = lines.typical_p if typical is None else lines.typical_p.index_select(0, typical)
        most = max(p.top_k for p in params) if all(p.top_k > 0 for p in params) else None
        return cls(params, most, top_k, limited, top_p, min_p, typical, typical_p)

    @classmethod
    def made(cls, params: Sequence[SamplingParams], device: torch.device) -> Warpers:
        """The same of rows that nothing is kept of."""
        typical = some(typical_places(params), len(params))
        return cls.of(params, lines_of(device, params), None if typical is None else tensor_on(device, typical))


class SamplingMetadata:
    """What drawing needs of a batch.

    Args:
        rows: In the order of the logits; one may come several times.
        positions: Of the tokens that are drawn next.
        histories: Of the logits' device and vocabulary.
        former: That of the step before, of other rows.

    Attributes:
        processors: What changes the logits; None if nothing does.
        told: Rows whose log-probabilities are wanted, int64; None for all or none.
        told_places: The same, for the host.
        alternatives: How many each row wants to be told.
        greedy: Whether no row is drawn.
        drawn: Rows that are drawn, int64; None for all.
        temperature: Of drawn rows, float32 (drawn, 1); None if all are 1.
        warped, unwarped: Which of the drawn rows have warpers and which have not, int64; None for all or none.
        warpers: Of the warped rows; None if there are none.
    """

    def __init__(
        self, rows: list[Row], positions: list[int], histories: TokenHistories, former: SamplingMetadata | None = None
    ) -> None:
        self._rows = rows
        self.processors: LogitsProcessors | None = None
        if not all(row.plain for row in rows):
            self.processors = LogitsProcessors(rows, positions, histories)
        self.alternatives = [row.alternatives for row in rows]
        self.told_places = [index for index, count in enumerate(self.alternatives) if count is not None]
        self._drawn_places = [index for index, row in enumerate(rows) if not row.greedy]
        self.greedy = not self._drawn_places
        self.told = self.drawn = self.warped = self.unwarped = self.temperature = None
        self.warpers: Warpers | None = None
        self._numbers: DrawnNumbers | None = None
        if self.greedy:
            told = some(self.told_places, len(rows))
            self.told = None if told is None else tensor_on(histories.device, told)
            return
        self._draw([rows[index] for index in self._drawn_places], positions, histories.device, former)

    def _draw(
        self, drawn: list[Row], positions: list[int], device: torch.device, former: SamplingMetadata | None
    ) -> None:
        """What is drawn by: a copy to the device for what the rows ask for, and one more if they are not all of one kind."""
        positions = self._of_drawn(positions)
        warped = [index for index, row in enumerate(drawn) if row.warps]
        params = [drawn[index].params for index in warped]
        chosen = [
            some(self.told_places, len(self._rows)), some(self._drawn_places, len(self._rows)),
            some(warped, len(drawn)), some([index for index, row in enumerate(drawn) if not row.warps], len(drawn)),
            some(typical_places(params), len(params)),
        ]  # fmt: skip
        indexes = iter(tensors_on(device, present) if (present := [its for its in chosen if its is not None]) else ())
        self.told, self.drawn, self.warped, self.unwarped, typical = (
            None if its is None else next(indexes) for its in chosen
        )
        lines = lines_on(device, drawn, positions)
        before = None if former is None else former._numbers
        self._numbers = DrawnNumbers(drawn, positions, lines.states, lines.own(0), before)
        if any(row.params.temperature != 1 for row in drawn):
            self.temperature = lines.temperature
        if warped:
            of_warped = lines if self.warped is None else lines.select(self.warped)
            self.warpers = Warpers.of(params, of_warped, typical)

    @property
    def numbers(self) -> torch.Tensor:
        """What rows are drawn by at the next step, float64 (drawn,)."""
        assert self._numbers is not None, "a row is drawn"
        return self._numbers.next

    def of(self, rows: list[Row]) -> bool:
        """Whether these are its rows."""
        return rows == self._rows

    def move(self, positions: list[int]) -> None:
        """Be as the next draws need it, of the same rows."""
        if self.processors is not None:
            self.processors.move(positions)
        if self._numbers is not None:
            self._numbers.move(self._of_drawn(positions))

    def _of_drawn(self, positions: list[int]) -> list[int]:
        if len(self._drawn_places) == len(positions):
            return positions
        return [positions[index] for index in self._drawn_places]


def typical_places(params: Sequence[SamplingParams]) -> list[int]:
    """Which of these have a typical-p."""
    return [index for index, p in enumerate(params) if p.typical_p < 1]


def some(places: list[int], rows: int) -> list[int] | None:
    """These as an index; None if they are all or none."""
    return places if 0 < len(places) < rows else None
