"""Waiting requests of one model: bounded, by priority, fair between clients.

Within one priority each client has a line of its own, and the lines take turns, so that a client with ten thousand
waiting requests delays another's first one by one place. A resubmitted request goes to the head of its client's line:
it has waited before.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What a queue needs to know of its items."""

    @property
    def priority(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def owner(self) -> Hashable: ...


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """Items by priority (the lowest number first), then by turns of their owners, then in order of arrival."""

    __slots__ = ("_levels", "_priorities", "_size")

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Hashable, deque[W]]] = {}
        self._priorities: list[int] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: W) -> None:
        """Add an item."""
        level = self._levels.get(item.priority)
        if level is None:
            level = self._levels[item.priority] = OrderedDict()
            heapq.heappush(self._priorities, item.priority)
        line = level.get(item.owner)
        if line is None:
            line = level[item.owner] = deque()
        if item.attempt:
            line.appendleft(item)
        else:
            line.append(item)
        self._size += 1

    def peek(self) -> W:
        """The item that `pop` would give. Raises: IndexError if there is none."""
        return next(iter(self._levels[self._priorities[0]].values()))[0]

    def pop(self) -> W:
        """Take the next item; its owner goes to the end of the turn. Raises: IndexError if there is none."""
        level = self._levels[self._priorities[0]]
        owner, line = next(iter(level.items()))
        item = line.popleft()
        if line:
            level.move_to_end(owner)
        else:
            del level[owner]
            if not level:
                del self._levels[heapq.heappop(self._priorities)]
        self._size -= 1
        return item

    def remove(self, item: W) -> None:
        """Take out an item that waits. Raises: ValueError, KeyError if it does not."""
        level = self._levels[item.priority]
        line = level[item.owner]
        line.remove(item)
        if not line:
            del level[item.owner]
            if not level:
                del self._levels[item.priority]
                self._priorities.remove(item.priority)
                heapq.heapify(self._priorities)
        self._size -= 1

    def items(self) -> list[W]:
        """All that wait, by priority and owner."""
        levels = (self._levels[priority] for priority in sorted(self._levels))
        return [item for level in levels for line in level.values() for item in line]
