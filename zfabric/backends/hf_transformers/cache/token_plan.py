"""Which tokens of a pass a CPU's kernel computes one by one, and where it finds their keys."""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import torch

from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass, Stretches

#: Keys that the tokens of a part see, in sum, up to which they are computed one by one. Beyond, torch's kernel is faster, which
#: multiplies blocks of tokens by blocks of keys: in µs, of 9 heads of 64 numbers in bfloat16 on one thread, 45 tokens (1,035
#: keys) take 63 instead of 204, 96 (4,656) 228 instead of 437; of 32 heads of 128 numbers 16 at the end of 512 (8,072) 3,143
#: instead of 2,558.
_SEEN_MAX: Final = 4_096


class TokenPlan:
    """How one kind of layer is computed in a pass, where there is a kernel.

    Args:
        window: Tokens that each sees, itself included; None for all before it.
    """

    def __init__(self, passed: PagedPass, window: int | None) -> None:
        self._passed, self._window = passed, window
        several = range(passed.singles, len(passed.counts))
        self._short = {row for row in several if self._is_short(row)}
        self._long = [row for row in several if row not in self._short]

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Of those that are computed one by one: (count, 4) int64, see `attention_kernel.attend`."""
        passed, window = self._passed, self._window
        singles = passed.singles
        rows = [np.arange(singles)]
        places, ends = [np.arange(singles)], [np.array(passed.lengths[:singles], np.int64)]
        begin = singles
        for row in range(singles, len(passed.counts)):
            count, length = passed.counts[row], passed.lengths[row]
            if row in self._short:
                rows.append(np.full(count, row))
                places.append(np.arange(begin, begin + count))
                ends.append(np.arange(length - count + 1, length + 1))
            begin += count
        end = np.concatenate(ends)
        first = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
        return torch.from_numpy(np.stack([np.concatenate(places), np.concatenate(rows), first, end], axis=1))

    @cached_property
    def tables(self) -> torch.Tensor:
        """Blocks of all rows, (rows, blocks) int64; shorter ones have others behind."""
        passed = self._passed
        if passed.singles == len(passed.counts):
            blocks, width = passed.step(torch.device("cpu"))
            return blocks.view(-1, width)
        return passed.matrix()

    @cached_property
    def parts(self) -> list[tuple[int, int, Stretches, torch.Tensor | None]]:
        """Rows of several tokens that are not computed one by one, see `PagedPass.parts`."""
        return self._passed.parts(self._window, torch.device("cpu"), self._long)

    def _is_short(self, row: int) -> bool:
        passed = self._passed
        count, length = passed.counts[row], passed.lengths[row]
        if passed.spans and passed.spans[row]:
            return False
        return count * (2 * length - count + 1) <= 2 * _SEEN_MAX
