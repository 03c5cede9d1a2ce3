"""The table of request states over all pairs, queues and candidates against plain models of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.core.access import EVERYBODY
from zfabric.core.dispatch import POLICIES, Candidates, Host, find_policy, register_policy, shortest_queue
from zfabric.core.queueing import FairQueue
from zfabric.core.registry import ClientPeer, Registry, Request, WorkerPeer
from zfabric.core.request_state import TERMINAL_GIVEN, TRANSITIONS, RequestEvent, RequestState, advance
from zfabric.core.timers import Timers
from zfabric.errors import ConfigurationError
from zfabric.ids import RoutingId
from zfabric.wire.messages import ClientHello, Load, ModelInfo, WorkerHello


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


@dataclass(eq=False)
class Item:
    owner: int
    priority: int
    attempt: int
    number: int


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.integers(-1, 1), st.booleans(), st.sampled_from(["push", "push", "pop", "remove"])
        )
    )
)
def test_a_queue_keeps_priority_and_order_of_each_owner(steps: list[tuple[int, int, bool, str]]) -> None:
    queue: FairQueue[Item] = FairQueue()
    lines: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for number, (owner, priority, again, step) in enumerate(steps):
        if step == "push":
            item = Item(owner, priority, int(again), number)
            queue.push(item)
            line = lines[priority, owner]
            line.insert(0 if again else len(line), item)
        elif step == "pop" and len(queue):
            expected = queue.peek()
            item = queue.pop()
            assert item is expected
            assert item.priority == min(key[0] for key, line in lines.items() if line)
            assert lines[item.priority, item.owner].pop(0) is item
        elif step == "remove" and len(queue):
            item = queue.items()[number % len(queue)]
            queue.remove(item)
            lines[item.priority, item.owner].remove(item)
        assert len(queue) == sum(map(len, lines.values())) == len(queue.items())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_owners_take_turns(owners: list[int]) -> None:
    queue: FairQueue[Item] = FairQueue()
    for number, owner in enumerate(owners):
        queue.push(Item(owner, 0, 0, number))
    left = Counter(owners)
    served: list[int] = []
    while len(queue):
        served.append(queue.pop().owner)
        left[served[-1]] -= 1
        waiting = {owner for owner, count in left.items() if count}
        recent = served[-len(waiting) - 1 :]
        assert not waiting or all(recent.count(owner) <= 2 for owner in waiting)
    first_rounds = served[: len(set(owners))]
    assert len(set(first_rounds)) == len(first_rounds)


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
        chosen = shortest_queue(candidates, rng)
        assert chosen is not None
        assert chosen.queue_ratio == least
        assert {id(other) for other in candidates} == {id(other) for other in hosts if other.position >= 0}


@settings(max_examples=60)
@given(
    st.sampled_from([3, 24]),
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 2), st.booleans()), min_size=1, max_size=150),
)
def test_candidates_follow_every_request(count: int, moves: list[tuple[int, int, bool]]) -> None:
    """Three models at each worker, one of them with a slot less than the worker has."""
    registry = Registry(random.Random(2))
    client = ClientPeer(1, ClientHello(version=1, build="", instance=1), b"", RoutingId(b"c"), EVERYBODY, 0)
    for number in range(count):
        models = [ModelInfo(name=f"m{model}", slots=2 if model == 0 else 0) for model in range(3)]
        hello = worker_hello(number, models, 3, speed=1.0 + number % 2)
        registry.announce(WorkerPeer(hello, number, b"", RoutingId(b"%d" % number), 0), models)
    workers = list(registry.workers.values())
    for order, (index, model, leave) in enumerate(moves):
        worker = workers[index % count]
        if leave and worker.live:
            gone = worker.live.pop(next(iter(worker.live)))
            assert gone.host is not None
            gone.host.live.remove(gone.key)
            registry.moved(worker, gone.host)
        elif worker.hosts[f"m{model}"].open:
            host = worker.hosts[f"m{model}"]
            request = Request(
                client, instance=1, request=order, attempt=0, operation="generate", state=RequestState.RUNNING
            )
            request.host = host
            worker.live[request.key] = request
            host.live.add(request.key)
            registry.moved(worker, host)
        for known in registry.models.values():
            able = [hosting for hosting in known.hosts.values() if hosting.open]
            assert {id(host) for host in known.candidates} == {id(host) for host in able}
            if able:
                least = known.candidates.least_loaded(random.Random(order))
                assert least.queue_ratio == min(len(hosting.worker.live) / hosting.speed for hosting in able)


def test_a_name_is_a_model_first_and_an_alias_while_nobody_hosts_it() -> None:
    registry = Registry(random.Random(1))
    for number, info in enumerate([ModelInfo(name="chat"), ModelInfo(name="llama", aliases=["chat"])]):
        hello = worker_hello(number, [info], 1)
        registry.announce(WorkerPeer(hello, number, b"", RoutingId(b"%d" % number), 0), [info])
    chat, llama = registry.models["chat"], registry.models["llama"]
    assert registry.find("chat") is chat
    registry.withdraw(registry.workers["w0"], "chat")
    assert registry.find("chat") is llama
    registry.withdraw(registry.workers["w1"], "llama")
    assert registry.find("chat") is chat
    registry.forget(chat)
    assert registry.find("chat") is llama
    registry.forget(llama)
    assert registry.find("chat") is None


@pytest.mark.parametrize("count", [3, 40])
def test_lottery_draws_by_speed(count: int) -> None:
    rng = random.Random(7)
    candidates = Candidates()
    for number in range(count):
        candidates.add(Host(f"h{number}", float(number % 4), 0), rng)
    speeds = {host.name: host.speed for host in candidates}
    drawn = Counter(host.name for _ in range(20_000) if (host := POLICIES["lottery"](candidates, rng)) is not None)
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
    assert POLICIES["lottery"](candidates, rng) is None
    hosts = [Host(f"h{n}", 1.0, 0) for n in range(4)]
    for host in hosts:
        candidates.add(host, rng)
    in_turn = [POLICIES["round_robin"](candidates, rng) for _ in range(8)]
    assert Counter(map(str, in_turn)) == Counter({str(host): 2 for host in hosts})
    hosts[0].line.length = 5
    assert all(POLICIES["power_of_two"](candidates, rng) is not None for _ in range(50))
    for number, host in enumerate(hosts):
        host.latency_ns = 100.0 + number
    assert POLICIES["least_latency"](candidates, rng) is hosts[1]


def test_a_policy_is_added_by_name_once() -> None:
    def mine(candidates: Candidates, rng: random.Random) -> Host | None:
        return candidates[0]

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


def worker_hello(number: int, models: list[ModelInfo], slots: int, speed: float = 1.0) -> WorkerHello:
    load = Load(slots=slots)
    return WorkerHello(version=1, build="", name=f"w{number}", instance=number, models=models, load=load, speed=speed)
