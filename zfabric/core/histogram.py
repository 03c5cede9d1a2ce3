"""How long things took, as counts in buckets: what is added up over processes and time, as Prometheus wants it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

_DECADES: Final = range(5, 12)  # 10**5 ns is 100 µs
#: Upper bounds of the buckets, in nanoseconds: 1, 2 and 5 of each decade from 100 µs to 100 s.
BOUNDS_NS: Final = tuple(step * 10**decade for decade in _DECADES for step in (1, 2, 5) if step * 10**decade <= 10**11)


class Histogram:
    """Durations by bucket.

    Attributes:
        counts: How many fell into each bucket of BOUNDS_NS, and, last, how many were longer.
        total_ns: Their sum.

    Example:
        >>> taken = Histogram()
        >>> taken.observe(1_500_000)
        >>> taken.count, taken.total_ns
        (1, 1500000)
    """

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.total_ns = 0

    def observe(self, duration_ns: int, times: int = 1) -> None:
        """Count one, or several that are alike.

        What is negative counts as nothing: clocks of one process do not go back, but stamps may be of another.
        """
        self.counts[bisect_left(BOUNDS_NS, duration_ns)] += times
        if duration_ns > 0:
            self.total_ns += duration_ns * times

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)
