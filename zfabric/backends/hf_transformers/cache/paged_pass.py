"""What one pass over pages computes, and how attention gets at each row's keys: made once, for all layers that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from operator import is_
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from zfabric.backends.hf_transformers.cache.free_blocks import runs_of

#: A row of fewer bytes, keys and values of a layer, is copied in less time than a call of its own takes: 8 rows of 92 KB take 83
#: instead of 146 µs, of 460 KB 518 instead of 317 µs.
_GATHERED_BYTES_MAX: Final = 192 * 1024

#: Begins and ends of stretches of the pool.
Runs = list[tuple[int, int]]


class Stretches(NamedTuple):
    """Where a row's tokens lie.

    Attributes:
        runs: Stretches of the pool, one after the other.
        blocks: Those that they are in, if there are several.
        first: Place of the first token in the first block.
        tokens: How many.
    """

    runs: Runs
    blocks: torch.Tensor | None
    first: int
    tokens: int


class PagedPass:
    """What one pass computes, and where its rows lie.

    Args:
        counts: Tokens of each row that are computed; rows with one come first.
        lengths: Of each row afterwards.
        tables: Blocks of each row.
        block_tokens: Tokens that a block has room for.
        runs: Stretches of each row's blocks, where they are known.
        step: Makes the tables of a step one tensor; one of its own by default.
        masks: What was made of lengths, windows and spans alone, by passes of the same rows over other tables.
        spans: Of each row, begins and ends of tokens that see one another whichever comes first; empty if no row has any.
    """

    def __init__(
        self,
        counts: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_tokens: int,
        runs: Sequence[Sequence[Sequence[int]]] | None = None,
        step: StepTables | None = None,
        masks: dict[Any, torch.Tensor] | None = None,
        spans: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        self.counts, self.lengths, self._tables = counts, lengths, tables
        self._step = step or StepTables()
        self.spans = spans
        self.block_tokens = block_tokens
        self._runs = [runs_of(table) for table in tables] if runs is None else runs
        self.singles = sum(count == 1 for count in counts)
        self._plans: dict[Any, Plan] = {}
        #: What others made for layers that are alike.
        self.kept: dict[Any, Any] = {}
        self.masks = {} if masks is None else masks

    def slots(self) -> list[int]:
        """Where in the pool the tokens go."""
        size, found = self.block_tokens, []
        for count, length, table in zip(self.counts, self.lengths, self._tables, strict=True):
            if count == 1:
                block, place = divmod(length - 1, size)
                found.append(table[block] * size + place)
            else:
                found += [table[place // size] * size + place % size for place in range(length - count, length)]
        return found

    def blocks(self, row: int, low: int) -> Sequence[int]:
        """Those that hold its tokens from `low` on."""
        size = self.block_tokens
        return self._tables[row][low // size : -(-self.lengths[row] // size)]

    def runs(self, row: int, low: int) -> Runs:
        """Where its tokens from `low` on lie."""
        size, length = self.block_tokens, self.lengths[row]
        found: Runs = []
        place = 0
        for begin, end in self._runs[row]:
            after = place + (end - begin) * size
            if after > low:
                found.append((begin * size + max(0, low - place), begin * size + min(after, length) - place))
            place = after
            if place >= length:
                break
        return found

    def stretches(self, row: int, low: int, device: torch.device) -> Stretches:
        """Where its tokens from `low` on lie."""
        runs = self.runs(row, low)
        blocks = torch.tensor(self.blocks(row, low), device=device) if len(runs) > 1 else None
        return Stretches(runs, blocks, low % self.block_tokens, self.lengths[row] - low)

    def step(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Blocks of the rows with one token, one row after the other, and how many each has there."""
        return self._step.of(self._tables[: self.singles], device)

    def plan(self, window: int | None, token_bytes: int, like: torch.Tensor) -> Plan:
        """How to compute it, made once for all layers that are alike.

        Args:
            window: Tokens that each sees, itself included; None for all before it.
            token_bytes: Of keys and values in a layer.
            like: A tensor of the type that is computed in, where that is done.
        """
        key = (window, token_bytes)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = Plan(self, window, token_bytes, like)
        return found

    def low(self, row: int, window: int | None) -> int:
        """The first token that any of the row's computed ones sees."""
        return 0 if window is None else max(0, self.lengths[row] - self.counts[row] + 1 - window)

    def parts(
        self, window: int | None, device: torch.device, rows: Sequence[int] | None = None
    ) -> list[tuple[int, int, Stretches, torch.Tensor | None]]:
        """Rows of several tokens, or those of them that are named: begin and end among the tokens, where the keys lie, and which
        of them each token sees."""
        made, begin = [], self.singles
        for row in range(self.singles, len(self.counts)):
            count, low = self.counts[row], self.low(row, window)
            if rows is None or row in rows:
                its = self.stretches(row, low, device)
                made.append((begin, begin + count, its, self._seen(row, low, window, device)))
            begin += count
        return made

    def _seen(self, row: int, low: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which tokens from `low` on each computed one of a row sees; None if these are all tokens of its text."""
        count, length = self.counts[row], self.lengths[row]
        spans = self.spans[row] if self.spans else ()
        if count == length and window is None and not spans:
            return None
        key = ("part", window, row)
        mask = self.masks.get(key)
        if mask is None:
            queries = torch.arange(length - count, length, device=device).unsqueeze(1)
            keys = torch.arange(low, length, device=device).unsqueeze(0)
            mask = keys <= queries
            for first, last in spans:
                mask |= (first <= queries) & (queries < last) & (first <= keys) & (keys < last)
            # A window hides what is before it from these as well.
            if window is not None:
                mask &= queries - keys < window
            self.masks[key] = mask
        return mask

    def matrix(self) -> torch.Tensor:
        """Blocks of all rows below one another, int64; shorter ones end with zeros."""
        return torch.from_numpy(_matrix(self._tables))

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a kernel that reads block tables: ends of the rows' tokens, their lengths, their tables; int32."""
        ends = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tables = torch.from_numpy(_matrix(self._tables).astype(np.int32))
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return ends.to(device), lengths.to(device), tables.to(device)


class Plan:
    """How one kind of layer is computed in a pass; arguments as of `PagedPass.plan`.

    Attributes:
        gathered: Rows of one token whose keys and values are copied side by side.
        in_place: Those that are read where they lie.
    """

    def __init__(self, passed: PagedPass, window: int | None, token_bytes: int, like: torch.Tensor) -> None:
        self._passed, self._window, self._device, self._dtype = passed, window, like.device, like.dtype
        self.block_tokens = passed.block_tokens
        singles = range(passed.singles)
        self.gathered = list(singles)
        self.in_place: list[tuple[int, Stretches]] = []
        if like.device.type != "cpu":
            return
        longest = max(passed.lengths[: passed.singles], default=0) * token_bytes
        if len(singles) > 1 and longest <= _GATHERED_BYTES_MAX:
            return
        self.gathered = []
        for row in singles:
            low = passed.low(row, window)
            its = passed.stretches(row, low, like.device)
            # A row that is alone is read where it lies, however short, unless it is in pieces.
            if its.tokens * token_bytes <= _GATHERED_BYTES_MAX and len(its.runs) + len(singles) > 2:
                self.gathered.append(row)
            else:
                self.in_place.append((row, its))

    @cached_property
    def whole(self) -> bool:
        """Whether all tokens are of rows that are gathered."""
        return len(self.gathered) == len(self._passed.counts)

    @cached_property
    def rows(self) -> torch.Tensor | slice:
        """Those that are gathered, among the tokens."""
        if len(self.gathered) == self._passed.singles:
            return slice(0, self._passed.singles)
        return torch.tensor(self.gathered, device=self._device)

    @cached_property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of the gathered rows' keys, one row after the other, and what is added to the scores of the places in these,
        (rows, 1, 1, places)."""
        passed, size, rows = self._passed, self.block_tokens, self.gathered
        if self._window is None and len(rows) == passed.singles:
            index, width = passed.step(self._device)
            return index, _hidden(passed.lengths[: passed.singles], width * size, self._dtype, self._device)
        lows = [passed.low(row, self._window) for row in rows]
        blocks = _matrix([passed.blocks(row, low) for row, low in zip(rows, lows, strict=True)])
        key = ("step", self._window, *rows)
        added = passed.masks.get(key)
        if added is None:
            ends = [passed.lengths[row] - low // size * size for row, low in zip(rows, lows, strict=True)]
            added = passed.masks[key] = _hidden(ends, blocks.shape[1] * size, self._dtype, self._device)
            if self._window is not None:
                before = np.arange(added.shape[3]) < np.array([[low % size] for low in lows])
                added[:, 0, 0].masked_fill_(torch.from_numpy(before).to(self._device), float("-inf"))
        return torch.from_numpy(blocks).flatten().to(self._device), added

    @cached_property
    def parts(self) -> list[tuple[int, int, Stretches, torch.Tensor | None]]:
        """Rows of several tokens, see `PagedPass.parts`."""
        return self._passed.parts(self._window, self._device)

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PagedPass.tensors`."""
        return self._passed.tensors(self._device)


class StepTables:
    """Blocks of the rows that are stepped as one tensor, which is kept from step to step and changed where they have changed:
    tables are lists that nothing but grows."""

    def __init__(self) -> None:
        self._tables: list[Sequence[int]] = []
        self._counts: list[int] = []
        self._matrix: Any = None
        self._sent: torch.Tensor | None = None

    def of(self, tables: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, int]:
        """Blocks of the rows, one row after the other, and how many each has there: shorter ones have others behind."""
        counts = [len(table) for table in tables]
        same = len(tables) == len(self._tables) and all(map(is_, tables, self._tables))
        if not same or max(counts) > self._matrix.shape[1]:
            self._matrix, self._sent = _matrix(tables), None
        elif counts != self._counts:
            for row, (before, count) in enumerate(zip(self._counts, counts, strict=True)):
                if count != before:
                    self._matrix[row, before:count] = tables[row][before:]
            self._sent = self._sent if device.type == "cpu" else None
        self._tables, self._counts = list(tables), counts
        if self._sent is None:
            self._sent = torch.from_numpy(self._matrix).flatten().to(device)
        return self._sent, self._matrix.shape[1]


def _matrix(tables: Sequence[Sequence[int]]) -> Any:
    """Tables below one another, as int64; shorter ones end with zeros."""
    width = max(map(len, tables))
    return np.array([table if len(table) == width else [*table, *[0] * (width - len(table))] for table in tables])


def _hidden(ends: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What hides the places from each row's end on when it is added to their scores, (rows, 1, 1, width)."""
    most = 1 << (width - 1).bit_length()
    # Each row is a window of the same zeros, which others follow: as far to the left as its end is.
    starts = torch.tensor([most - end for end in ends], device=device)
    return _steps(most, dtype, device).unfold(0, width, 1).index_select(0, starts).view(-1, 1, 1, width)


@cache
def _steps(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """So many zeros, and as many negative infinities."""
    return torch.cat([torch.zeros(size), torch.full((size,), float("-inf"))]).to(device, dtype)
