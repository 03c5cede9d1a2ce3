"""Which blocks of the cache are free: in runs, so that what a row reads lies in few pieces.

On a CPU attention reads a run of blocks in place, by one call. A run therefore begins in the middle of the longest free one,
where its neighbours and itself have the most room to grow, and grows block by block as long as the next one is free.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence


class FreeBlocks:
    """Free blocks, as runs that do not touch.

    Args:
        count: Of all blocks; all are free at first.
    """

    def __init__(self, count: int) -> None:
        self._begins = [0] if count else []
        self._ends = {0: count} if count else {}
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take_next(self, block: int) -> bool:
        """Take this one. False if it is not free."""
        place = bisect_right(self._begins, block) - 1
        if place < 0 or block >= self._ends[self._begins[place]]:
            return False
        self._cut(place, block)
        return True

    def take(self) -> int:
        """Take one, for a run that begins.

        Raises:
            IndexError: None is free.
        """
        if not self._begins:
            raise IndexError("no block is free")
        place = max(range(len(self._begins)), key=lambda one: self._ends[self._begins[one]] - self._begins[one])
        begin = self._begins[place]
        end = self._ends[begin]
        # The first run of all has no neighbour before it.
        block = begin if begin == 0 else (begin + end) // 2
        self._cut(place, block)
        return block

    def give(self, block: int) -> None:
        """It is free again."""
        begin, end = block, block + 1
        place = bisect_left(self._begins, block)
        if place < len(self._begins) and self._begins[place] == end:
            end = self._ends.pop(self._begins.pop(place))
        if place and self._ends[self._begins[place - 1]] == begin:
            begin = self._begins[place - 1]
        else:
            insort(self._begins, begin)
        self._ends[begin] = end
        self._count += 1

    def _cut(self, place: int, block: int) -> None:
        begin = self._begins[place]
        end = self._ends.pop(begin)
        if begin < block:
            self._ends[begin] = block
        else:
            del self._begins[place]
        if block + 1 < end:
            insort(self._begins, block + 1)
            self._ends[block + 1] = end
        self._count -= 1


def runs_of(blocks: Sequence[int]) -> list[list[int]]:
    """Stretches of blocks that lie side by side, as begins and ends."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return found
