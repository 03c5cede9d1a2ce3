"""Queues and rankings against plain models of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfabric.core.controller.fair_queue import FairQueue
from zfabric.core.controller.names import Names
from zfabric.core.controller.ranking import Ranking


@dataclass(eq=False)
class Item:
    owner: int
    priority: int
    arrival: int
    demand: str = "generate"


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 4), st.sampled_from(["put", "put", "discard", "first"]))))
def test_a_ranking_is_a_sorted_list(steps: list[tuple[int, int, str]]) -> None:
    ranking: Ranking[int] = Ranking()
    plain: dict[int, int] = {}
    for item, rank, step in steps:
        if step == "put":
            ranking.put(item, rank)
            plain.pop(item, None)
            plain[item] = rank
        elif step == "discard":
            ranking.discard(item)
            plain.pop(item, None)
        assert len(ranking) == len(plain)
        assert list(ranking) == list(plain)
        if plain:
            # Of equal ranks the one that was put first.
            assert ranking.first() == min(plain, key=lambda each: plain[each])
        else:
            with pytest.raises(IndexError):
                ranking.first()


def test_what_leaves_a_ranking_does_not_pile_up() -> None:
    ranking: Ranking[int] = Ranking()
    for number in range(10_000):
        ranking.put(number, number)
        ranking.put(0, number)
        ranking.discard(number - 3)
    assert len(ranking) < 5
    assert len(ranking._heap) < 50
    assert not any(entry.item is not None and entry.item not in ranking for *_, entry in ranking._heap)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(-1, 1),
            st.integers(0, 40),
            st.sampled_from(["generate", "embed"]),
            st.sampled_from(["push", "push", "serve", "oldest", "remove"]),
        )
    )
)
def test_a_queue_keeps_priority_and_order_of_each_owner(steps: list[tuple[int, int, int, str, str]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    waiting: dict[str, list[Item]] = defaultdict(list)
    for number, (owner, priority, arrival, demand, step) in enumerate(steps):
        line = waiting[demand]
        if step == "push":
            item = Item(owner, priority, arrival, demand)
            queue.push(item)
            line.append(item)
        elif not line:
            with pytest.raises(KeyError):
                queue.head(demand)
            with pytest.raises(KeyError):
                queue.remove(Item(owner, priority, arrival, demand))
        elif step == "serve":
            item = queue.head(demand).item
            assert item.priority == min(other.priority for other in line)
            own = [other for other in line if (other.owner, other.priority) == (item.owner, item.priority)]
            assert item.arrival == min(other.arrival for other in own)
            queue.serve(item)
            queue.remove(item)
            line.remove(item)
        elif step == "oldest":
            assert queue.oldest(demand).item.arrival == min(other.arrival for other in line)
        else:
            item = line[number % len(line)]
            queue.remove(item)
            line.remove(item)
        assert queue.count(demand) == len(line)
        assert set(map(id, queue.waiting(demand))) == set(map(id, line))
        assert len(queue) == sum(map(len, waiting.values())) == len(queue.items())
        assert set(queue.demands) == {kind for kind, items in waiting.items() if items}
        assert all((item in queue) for item in queue.items())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_owners_take_turns(owners: list[int]) -> None:
    queue: FairQueue[Item] = FairQueue()
    for number, owner in enumerate(owners):
        queue.push(Item(owner, 0, number))
    left = Counter(owners)
    served: list[int] = []
    while len(queue):
        item = queue.head("generate").item
        queue.serve(item)
        queue.remove(item)
        served.append(item.owner)
        left[item.owner] -= 1
        waiting = {owner for owner, count in left.items() if count}
        recent = served[-len(waiting) - 1 :]
        assert not waiting or all(recent.count(owner) <= 2 for owner in waiting)
    first_rounds = served[: len(set(owners))]
    assert len(set(first_rounds)) == len(first_rounds)


def test_who_comes_late_waits_for_one_turn_of_each_other() -> None:
    queue: FairQueue[Item] = FairQueue()
    for number in range(1_000):
        queue.push(Item(1, 0, number))
    for number in (1_000, 1_001):
        item = queue.head("generate").item
        queue.serve(item)
        queue.remove(item)
        queue.push(Item(2, 0, number))
    assert [owner_served(queue) for _ in range(4)] == [2, 1, 2, 1]


def owner_served(queue: FairQueue[Item]) -> int:
    item = queue.head("generate").item
    queue.serve(item)
    queue.remove(item)
    return item.owner


def test_demands_take_turns_over_all_queues_of_one_source() -> None:
    turns = iter(range(1_000_000))
    first, second = FairQueue[Item](turns), FairQueue[Item](turns)
    for number in range(10):
        first.push(Item(1, 0, number))
        second.push(Item(2, 0, 100 + number, "embed"))
    served = []
    for _ in range(6):
        queue, demand = min(((first, "generate"), (second, "embed")), key=lambda pair: pair[0].head(pair[1]).rank)
        item = queue.head(demand).item
        queue.serve(item)
        queue.remove(item)
        served.append(item.owner)
    assert served == [1, 2, 1, 2, 1, 2]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 3), st.sampled_from(["held", "unheld", "own", "unown", "discard"])
        )
    )
)
def test_names_stand_for_whom_the_rule_says(steps: list[tuple[str, int, str]]) -> None:
    names: Names[int] = Names()
    plain: dict[str, dict[int, tuple[bool, bool, int]]] = defaultdict(dict)
    for order, (name, model, step) in enumerate(steps, start=1):
        if step == "discard":
            names.discard(name, model)
            plain[name].pop(model, None)
        else:
            own, held = "own" in step, not step.startswith("un")
            names.put(name, model, held=held, order=0 if own else order)
            plain[name].pop(model, None)
            plain[name][model] = (not held, not own, 0 if own else -order)
        for known, holders in plain.items():
            best = min(holders, key=lambda each: holders[each], default=None)
            assert names.find(known) == best
        assert len(names) == sum(bool(holders) for holders in plain.values())
