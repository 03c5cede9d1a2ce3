"""Waiting requests of one model: by demand, by priority, fair between clients.

What a request demands of a worker decides who can take it, so each demand has a part of its own: what nobody can take now
stands in no other request's way. Within a part lower priorities go first. Within one priority each owner has a line in
order of first arrival, and lines take turns, so that a client with ten thousand waiting requests delays another's first
one by one place. Parts take turns as well, with those of all queues that draw their numbers from the same source: a worker
that can serve several takes them in turn.

Every operation that changes something costs O(log n) in the number of requests that wait, amortised, in whatever order they
leave.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, KeysView
from typing import Generic, NamedTuple, Protocol, TypeVar

from zfabric.core.controller.ranking import Ranking


class Waiting(Hashable, Protocol):
    """What a queue needs to know of its items. None of it changes while they wait."""

    @property
    def demand(self) -> Hashable: ...
    @property
    def priority(self) -> int: ...
    @property
    def owner(self) -> Hashable: ...
    @property
    def arrival(self) -> int: ...


W = TypeVar("W", bound=Waiting)
#: The lesser goes first.
Rank = tuple[int, int]


class Head(NamedTuple, Generic[W]):
    """The item of a demand that goes first, and how it compares with the heads of others."""

    rank: Rank
    item: W


class _Line(Generic[W]):
    """What one owner has waiting at one priority."""

    __slots__ = ("items", "key")

    def __init__(self, key: tuple[int, Hashable]) -> None:
        self.key = key
        self.items: Ranking[W] = Ranking()


class _Part(Generic[W]):
    """What waits for one demand."""

    __slots__ = ("by_arrival", "by_turn", "lines", "served", "turn")

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.served = 0
        self.lines: dict[tuple[int, Hashable], _Line[W]] = {}
        self.by_turn: Ranking[_Line[W]] = Ranking()
        self.by_arrival: Ranking[W] = Ranking()


class FairQueue(Generic[W]):
    """Items by demand, priority, turns of their owners, and arrival.

    Args:
        turns: Numbers that grow. Whoever begins to wait draws one, so that it comes after all who wait already, and so does
            whoever was served.

    Attributes:
        weight: Items that go in one turn, at least 1.
    """

    __slots__ = ("_parts", "_turns", "weight")

    def __init__(self, turns: Iterator[int] | None = None) -> None:
        self._turns = turns or itertools.count()
        self.weight = 1
        self._parts: dict[Hashable, _Part[W]] = {}

    @property
    def lines(self) -> int:
        """Owners that wait, each once for each priority and demand."""
        return sum([len(part.lines) for part in self._parts.values()])

    def __len__(self) -> int:
        return sum([len(part.by_arrival) for part in self._parts.values()])

    def __contains__(self, item: W) -> bool:
        part = self._parts.get(item.demand)
        return part is not None and item in part.by_arrival

    @property
    def demands(self) -> KeysView[Hashable]:
        """What is waited for."""
        return self._parts.keys()

    def push(self, item: W) -> None:
        """Add an item."""
        part = self._parts.get(item.demand)
        if part is None:
            part = self._parts[item.demand] = _Part(next(self._turns))
        key = (item.priority, item.owner)
        line = part.lines.get(key)
        if line is None:
            line = part.lines[key] = _Line(key)
            part.by_turn.put(line, (item.priority, next(self._turns)))
        line.items.put(item, item.arrival)
        part.by_arrival.put(item, item.arrival)

    def count(self, demand: Hashable) -> int:
        """How many wait for a demand."""
        part = self._parts.get(demand)
        return len(part.by_arrival) if part is not None else 0

    def head(self, demand: Hashable) -> Head[W]:
        """What goes first of a demand, ranked by priority and turns. Raises: KeyError where nothing waits."""
        part = self._parts[demand]
        line = part.by_turn.first()
        return Head((line.key[0], part.turn), line.items.first())

    def oldest(self, demand: Hashable) -> Head[W]:
        """What has waited longest for a demand, ranked by arrival. Raises: KeyError where nothing waits."""
        item = self._parts[demand].by_arrival.first()
        return Head((item.arrival, 0), item)

    def serve(self, item: W) -> None:
        """An item's turn has come, and it is about to be removed: next it is the turn of others, of other owners in any case."""
        part = self._parts[item.demand]
        line = part.lines[item.priority, item.owner]
        turn = next(self._turns)
        part.by_turn.put(line, (item.priority, turn))
        part.served += 1
        if part.served >= self.weight:
            part.turn, part.served = turn, 0

    def remove(self, item: W) -> None:
        """Take an item out that is not wanted any more. Raises: KeyError if it does not wait."""
        part = self._parts[item.demand]
        if item not in part.by_arrival:
            raise KeyError(item)
        line = part.lines[item.priority, item.owner]
        line.items.discard(item)
        part.by_arrival.discard(item)
        if not line.items:
            del part.lines[line.key]
            part.by_turn.discard(line)
            if not part.lines:
                del self._parts[item.demand]

    def in_order(self, demand: Hashable) -> Iterator[W]:
        """All that wait for a demand, in the order in which they go if nobody comes and goes, and none is served for its age.
        Costs O(n log n) for all of them."""
        part = self._parts.get(demand)
        by_priority: dict[int, list[list[W]]] = {}
        for line in part.by_turn.sorted() if part is not None else ():
            by_priority.setdefault(line.key[0], []).append(line.items.sorted())
        for priority in sorted(by_priority):
            lines = by_priority[priority]
            for position in range(max(map(len, lines))):
                yield from (line[position] for line in lines if position < len(line))

    def waiting(self, demand: Hashable) -> list[W]:
        """All that wait for a demand."""
        part = self._parts.get(demand)
        return list(part.by_arrival) if part is not None else []

    def items(self) -> list[W]:
        """All that wait."""
        return [item for part in self._parts.values() for item in part.by_arrival]
