"""Items by rank, the least first, that may change their rank or leave from anywhere.

A heap in which a former rank stays behind until it comes up, or until such remains are more than half of it: `put` and
`discard` cost O(log n), amortised, in whatever order items leave. What stays behind holds no item.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any, Final, Generic, TypeVar

#: Remains are swept out when they are most of the heap; below this size nobody would notice.
_SWEEP_SIZE_MIN: Final = 32

T = TypeVar("T", bound=Hashable)


class _Entry(Generic[T]):
    """An item in the heap; None once it has left or has another rank."""

    __slots__ = ("item",)

    def __init__(self, item: T) -> None:
        self.item: T | None = item


def _rank_of(place: tuple[Any, int, _Entry[Any]]) -> tuple[Any, int]:
    return place[:2]


class Ranking(Generic[T]):
    """Items by rank. Ranks are compared with one another; equal ones keep the order in which they were put."""

    __slots__ = ("_entries", "_heap", "_order")

    def __init__(self) -> None:
        self._entries: dict[T, _Entry[T]] = {}
        self._heap: list[tuple[Any, int, _Entry[T]]] = []
        self._order = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        """All items, in the order in which they were put."""
        return iter(self._entries)

    def put(self, item: T, rank: Any) -> None:
        """Add an item, or give it another rank."""
        former = self._entries.pop(item, None)
        if former is not None:
            former.item = None
        entry = self._entries[item] = _Entry(item)
        self._order += 1
        heapq.heappush(self._heap, (rank, self._order, entry))
        self._sweep()

    def discard(self, item: T) -> None:
        """Take an item out; one that is not there is ignored."""
        entry = self._entries.pop(item, None)
        if entry is not None:
            entry.item = None
            self._sweep()

    def first(self) -> T:
        """The item of the least rank. Raises: IndexError if there is none."""
        heap = self._heap
        while (item := heap[0][2].item) is None:
            heapq.heappop(heap)
        return item

    def sorted(self) -> list[T]:
        """All items by rank. Costs O(n log n)."""
        return [entry.item for _, _, entry in sorted(self._heap, key=_rank_of) if entry.item is not None]

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + _SWEEP_SIZE_MIN:
            self._heap = [entry for entry in self._heap if entry[2].item is not None]
            heapq.heapify(self._heap)
