"""What rows ask for, as lines of numbers: a row's is made once, and those of a batch go to the device in one copy."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import array_on, tensor_on
from zfabric.backends.hf_transformers.sampling.random_numbers import seed_state
from zfabric.wire.sampling import SamplingParams

#: A top-p that cuts nothing off, whatever the rounding.
_ALL: Final = 2.0
#: A top-k that is more than any vocabulary has.
NO_TOP_K: Final = torch.iinfo(torch.long).max
#: Two integers, and seven floats as doubles: what has as many bits is sent together.
_LINE: Final = struct.Struct("=qq7d")
_COLUMNS: Final = _LINE.size // 8


class Lines:
    """Parameters of rows, a line for each; see `SamplingParams`.

    Args:
        sent: int64 (rows, columns), of `lines_on`.
        begin: Columns before those of the lines.
    """

    def __init__(self, sent: torch.Tensor, begin: int = 0) -> None:
        self._sent, self._begin = sent, begin
        self._floats: torch.Tensor | None = None

    def select(self, places: torch.Tensor) -> Lines:
        """Those of some of the rows."""
        return Lines(self._sent.index_select(0, places), self._begin)

    def own(self, column: int) -> torch.Tensor:
        """A column of the batch's own, int64 (rows,)."""
        return self._sent.select(1, column)

    @property
    def states(self) -> torch.Tensor:
        """int64 (rows,), see `seed_state`."""
        return self.own(self._begin)

    @property
    def top_k(self) -> torch.Tensor:
        """int64 (rows, 1), `NO_TOP_K` where a row has none."""
        return self._sent.narrow(1, self._begin + 1, 1)

    @property
    def temperature(self) -> torch.Tensor:
        """float32 (rows, 1), as those below."""
        return self._float(0)

    @property
    def top_p(self) -> torch.Tensor:
        """More than any mass where a row has none."""
        return self._float(1)

    @property
    def min_p(self) -> torch.Tensor:
        """0 where a row has none."""
        return self._float(2)

    @property
    def typical_p(self) -> torch.Tensor:
        """1 where a row has none."""
        return self._float(3)

    @property
    def penalties(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Repetition, presence, frequency."""
        return self._float(4), self._float(5), self._float(6)

    def _float(self, number: int) -> torch.Tensor:
        if self._floats is None:
            self._floats = self._sent.view(torch.float64)[:, self._begin + 2 :].float()
        return self._floats.narrow(1, number, 1)


def lines_on(device: torch.device, rows: Sequence[Row], *own: Sequence[int]) -> Lines:
    """Lines of these rows, and before them columns of the batch's own, a number of each for each row."""
    return _sent(device, [row.line or _made(row) for row in rows], own)


def lines_of(device: torch.device, params: Sequence[SamplingParams]) -> Lines:
    """The same of rows without seeds."""
    return _sent(device, [_packed(p, 0) for p in params], ())


def tokens_of(row: Row, device: torch.device, use: str, named: Callable[[Row], Iterable[int]]) -> torch.Tensor:
    """Tokens that a row names, int64 (tokens,), which stay on the device with it.

    Args:
        use: What for.
        named: Which; asked once.
    """
    return _kept(row, device, use, named, torch.long)


def values_of(row: Row, device: torch.device, use: str, named: Callable[[Row], Iterable[float]]) -> torch.Tensor:
    """The same of numbers, float32."""
    return _kept(row, device, use, named, torch.float32)


def _kept(
    row: Row, device: torch.device, use: str, named: Callable[[Row], Iterable[float]], dtype: torch.dtype
) -> torch.Tensor:
    found: torch.Tensor | None = row.tensors.get((use, device))
    if found is None:
        found = row.tensors[use, device] = tensor_on(device, list(named(row)), dtype)
    return found


def _sent(device: torch.device, lines: list[bytes], own: Sequence[Sequence[int]]) -> Lines:
    begin = len(own)
    numbers = np.empty((len(lines), begin + _COLUMNS), dtype=np.int64)
    for column, its in enumerate(own):
        numbers[:, column] = its
    numbers[:, begin:] = np.frombuffer(b"".join(lines), dtype=np.int64).reshape(-1, _COLUMNS)
    return Lines(array_on(device, numbers), begin)


def _made(row: Row) -> bytes:
    row.line = _packed(row.params, row.seed)
    return row.line


def _packed(p: SamplingParams, seed: int) -> bytes:
    top_k = p.top_k if p.top_k > 0 else NO_TOP_K
    top_p = p.top_p if p.top_p < 1 else _ALL
    penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
    return _LINE.pack(seed_state(seed), top_k, p.temperature, top_p, p.min_p, p.typical_p, *penalties)
