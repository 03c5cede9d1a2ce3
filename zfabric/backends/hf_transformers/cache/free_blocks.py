"""Which blocks of the cache are free: in runs, so that what a row reads lies in few pieces.

Without kernels of ours attention reads a run of blocks in place, by one call. A run therefore begins in the middle of the longest
free one, where its neighbours and itself have the most room to grow, and grows as long as the next block is free; what would not
fit into half of the longest begins where that does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final

#: Entries of the heap that are runs no more may be as many as those that are, and so many besides, before it is made anew.
_STALE_MAX: Final = 64


class FreeBlocks:
    """Free blocks, as runs that do not touch.

    Args:
        count: Of all blocks; all are free at first.
    """

    def __init__(self, count: int) -> None:
        self._begins = [0] if count else []
        self._ends = {0: count} if count else {}
        #: Lengths, negative, and begins: the longest run first, beside entries of runs that are no more.
        self._longest = [(-count, 0)]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def take_next(self, block: int, count: int) -> int:
        """Take this one and those after it: so many, or as many as are free on end. Returns how many that are."""
        place = bisect_right(self._begins, block) - 1
        count = min(count, self._ends[self._begins[place]] - block) if place >= 0 else 0
        if count <= 0:
            return 0
        self._cut(place, block, block + count)
        return count

    def take(self, count: int = 1) -> tuple[int, int]:
        """Take so many on end, for a run that begins, or as many as there are. Returns the first, and how many.

        Raises:
            IndexError: None is free.
        """
        if not self._begins:
            raise IndexError("no block is free")
        while True:
            negative, first = self._longest[0]
            if self._ends.get(first) == first - negative:
                break
            heappop(self._longest)
        place, longest = bisect_left(self._begins, first), -negative
        # The first run of all has no neighbour before it.
        if first and count <= longest - longest // 2:
            first += longest // 2
        count = min(count, longest)
        self._cut(place, first, first + count)
        return first, count

    def give(self, begin: int, end: int) -> None:
        """These are free again."""
        self._count += end - begin
        place = bisect_left(self._begins, begin)
        if place < len(self._begins) and self._begins[place] == end:
            end = self._ends.pop(self._begins.pop(place))
        if place and self._ends[self._begins[place - 1]] == begin:
            begin = self._begins[place - 1]
        else:
            insort(self._begins, begin)
        self._set(begin, end)

    def _cut(self, place: int, first: int, after: int) -> None:
        begin = self._begins[place]
        end = self._ends.pop(begin)
        if begin < first:
            self._set(begin, first)
        else:
            del self._begins[place]
        if after < end:
            insort(self._begins, after)
            self._set(after, end)
        self._count -= after - first

    def _set(self, begin: int, end: int) -> None:
        self._ends[begin] = end
        heappush(self._longest, (begin - end, begin))
        if len(self._longest) > 2 * len(self._begins) + _STALE_MAX:
            self._longest = [(begin - end, begin) for begin, end in self._ends.items()]
            heapify(self._longest)


def runs_of(blocks: Sequence[int]) -> list[list[int]]:
    """Stretches of blocks that lie side by side, as begins and ends."""
    found: list[list[int]] = []
    for block in blocks:
        if found and found[-1][1] == block:
            found[-1][1] = block + 1
        else:
            found.append([block, block + 1])
    return found
