"""The table of request states over all pairs, queues and candidates against plain models of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.dispatch import POLICIES, Ask, find_policy, register_policy, shortest_queue
from zfabric.core.controller.request_state import TERMINAL_GIVEN, TRANSITIONS, RequestEvent, RequestState, advance
from zfabric.core.timers import Timers
from zfabric.errors import ConfigurationError


@pytest.mark.parametrize("state", RequestState)
@pytest.mark.parametrize("event", RequestEvent)
def test_every_pair_is_in_the_table_or_a_bug(state: RequestState, event: RequestEvent) -> None:
    following = TRANSITIONS[state].get(event)
    if following is None:
        with pytest.raises(AssertionError, match=f"{state.name} cannot have {event.name}"):
            advance(state, event)
    else:
        assert advance(state, event) is following
        assert not (state in TERMINAL_GIVEN and following not in TERMINAL_GIVEN), "a terminal is never taken back"


@given(st.lists(st.sampled_from(RequestEvent), max_size=20))
def test_every_life_ends_with_one_terminal(events: list[RequestEvent]) -> None:
    state, terminals = RequestState.QUEUED, 0
    for event in events:
        following = TRANSITIONS[state].get(event)
        if following is None:
            continue
        terminals += state not in TERMINAL_GIVEN and following in TERMINAL_GIVEN
        state = following
    assert terminals == (state in TERMINAL_GIVEN)


def test_every_state_can_reach_the_end() -> None:
    reaches = {RequestState.DONE}
    while True:
        more = {state for state, row in TRANSITIONS.items() if reaches & set(row.values())} - reaches
        if not more:
            break
        reaches |= more
    assert reaches == set(RequestState)


@settings(max_examples=50)
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 8), st.booleans()), max_size=200))
def test_the_least_loaded_is_found_however_loads_change(count: int, changes: list[tuple[int, int, bool]]) -> None:
    rng = random.Random(1)
    candidates = Candidates()
    hosts = [Host(f"h{n}", 1.0 + n % 3, 0) for n in range(count)]
    for host in hosts:
        candidates.add(host, rng)
    for index, load, leave in changes:
        host = hosts[index % count]
        host.line.length = load
        if leave and len(candidates) > 1:
            candidates.remove(host)
        else:
            candidates.add(host, rng)
        least = min(other.queue_ratio for other in candidates)
        chosen = shortest_queue(Ask(candidates, rng))
        assert chosen is not None
        assert chosen.queue_ratio == least
        assert {id(other) for other in candidates} == {id(other) for other in hosts if other in candidates}


@pytest.mark.parametrize("count", [3, 40])
def test_lottery_draws_by_speed(count: int) -> None:
    rng = random.Random(7)
    candidates = Candidates()
    for number in range(count):
        candidates.add(Host(f"h{number}", float(number % 4), 0), rng)
    speeds = {host.name: host.speed for host in candidates}
    drawn = Counter(host.name for _ in range(20_000) if (host := POLICIES["lottery"](Ask(candidates, rng))) is not None)
    for name, speed in speeds.items():
        assert drawn[name] / 20_000 == pytest.approx(speed / sum(speeds.values()), abs=0.012)


@pytest.mark.parametrize("count", [3, 40])
def test_ties_are_drawn(count: int) -> None:
    rng = random.Random(3)
    candidates = Candidates()
    hosts = [Host(f"h{n}", 1.0, 0) for n in range(count)]
    for host in hosts:
        candidates.add(host, rng)
    chosen: set[str] = set()
    for _ in range(600):
        host = candidates.least_loaded(rng)
        chosen.add(host.name)
        candidates.changed(host, rng)
    assert len(chosen) == count


def test_the_other_policies() -> None:
    rng = random.Random(5)
    candidates = Candidates()
    assert POLICIES["lottery"](Ask(candidates, rng)) is None
    hosts = [Host(f"h{n}", 1.0, 0) for n in range(4)]
    for host in hosts:
        candidates.add(host, rng)
    in_turn = [POLICIES["round_robin"](Ask(candidates, rng)) for _ in range(8)]
    assert Counter(map(str, in_turn)) == Counter({str(host): 2 for host in hosts})
    hosts[0].line.length = 5
    assert all(POLICIES["power_of_two"](Ask(candidates, rng)) is not None for _ in range(50))
    for number, host in enumerate(hosts):
        host.latency_ns = 100.0 + number
    assert POLICIES["least_latency"](Ask(candidates, rng)) is hosts[1]


def test_a_policy_is_added_by_name_once() -> None:
    def mine(ask: Ask) -> Host | None:
        return ask.candidates[0]

    register_policy("mine", mine)
    try:
        assert find_policy("mine") is mine
        register_policy("mine", mine)
        with pytest.raises(ConfigurationError, match="exists"):
            register_policy("mine", shortest_queue)
    finally:
        del POLICIES["mine"]
    with pytest.raises(ConfigurationError, match="not one of"):
        find_policy("mine")


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=80))
def test_timers_come_in_order_and_not_when_cancelled(entries: list[tuple[int, bool]]) -> None:
    timers = Timers()
    seen: list[tuple[int, int]] = []

    def noting(entry: tuple[int, int]) -> Callable[[int], None]:
        return lambda _: seen.append(entry)

    made = [timers.at(at, noting((at, number))) for number, (at, _) in enumerate(entries)]
    for timer, (_, cancelled) in zip(made, entries, strict=True):
        if cancelled:
            timers.cancel(timer)
            timers.cancel(timer)
    expected = sorted((at, n) for n, (at, cancelled) in enumerate(entries) if not cancelled)
    assert len(timers) == len(expected)
    while (due := timers.next_ns()) is not None:
        timers.run(due)
    assert seen == expected


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Timers()
    for number in range(20_000):
        timers.cancel(timers.at(10**12 + number, lambda _: None))
    assert len(timers) == 0
    assert len(timers._heap) < 3_000
