"""Known blocks that no row has, in the order in which their place is wanted.

Blocks are left, found again and given up in runs that lie side by side: a row of a thousand tokens comes and goes in a few
calls, however many blocks it has.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import count


class IdleBlocks:
    """Blocks that nobody has. What was left the longest ago goes first, and of what was left together the end before the
    beginning.

    Args:
        size: Of all blocks; none is idle at first.
    """

    def __init__(self, size: int) -> None:
        #: The run that each block was left in; 0 if it is not idle.
        self._left_in = [0] * size
        #: Begin, end, and how many of them are still idle.
        self._runs: OrderedDict[int, list[int]] = OrderedDict()
        self._numbers = count(1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def count(self, blocks: list[int]) -> int:
        """How many of these are idle."""
        return sum([self._left_in[block] > 0 for block in blocks])

    def add(self, begin: int, end: int) -> None:
        """These are idle from now on."""
        number = next(self._numbers)
        self._left_in[begin:end] = [number] * (end - begin)
        self._runs[number] = [begin, end, end - begin]
        self._count += end - begin

    def remove(self, begin: int, end: int) -> None:
        """None of these is idle any more."""
        for number, taken in Counter(self._left_in[begin:end]).items():
            if number:
                self._count -= taken
                run = self._runs[number]
                run[2] -= taken
                if not run[2]:
                    del self._runs[number]
        self._left_in[begin:end] = [0] * (end - begin)

    def pop(self, most: int) -> tuple[int, int]:
        """Give up the first of them, so many at most; begin and end.

        Raises:
            StopIteration: There is none.
        """
        number, run = next(iter(self._runs.items()))
        begin, end, left = run
        left_in = self._left_in
        while left_in[end - 1] != number:
            end -= 1
        if left == end - begin:
            begin = max(begin, end - most)
        else:
            last, begin = begin, end - 1
            while begin > last and end - begin < most and left_in[begin - 1] == number:
                begin -= 1
        left_in[begin:end] = [0] * (end - begin)
        self._count -= end - begin
        run[1:] = begin, left - (end - begin)
        if not run[2]:
            del self._runs[number]
        return begin, end
