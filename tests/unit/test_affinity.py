"""Requests of one key run where the last one ran, while that worker has room and is no busier than it may be."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.broker import Bench, carried_of
from tests.peers import FakeFabric, model
from zfabric.core.controller.affinity import Affinities
from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.dispatch import Ask, consistent_hash, sticky_least_loaded
from zfabric.core.controller.hosting import Hosting
from zfabric.errors import ParameterRangeError
from zfabric.limits import AFFINITIES_MAX, AFFINITY_MODELS_MAX, AFFINITY_TTL_MS, HASH_LOAD_RATIO
from zfabric.wire.messages import Claim, Claims

STICKY = "sticky_least_loaded"


def fabric_of(workers: int, slots: int = 100, **settings: object) -> FakeFabric:
    fabric = FakeFabric(policy=STICKY, **settings)
    fabric.client("alice")
    for number in range(workers):
        fabric.worker(f"w{number}", model(), slots=slots)
    return fabric


def where(fabric: FakeFabric, number: int) -> str:
    """Whose request it is."""
    (name,) = [name for name in fabric.dispatches if number in [it.request for it in fabric.dispatches[name]]]
    return name


def test_a_key_stays_and_new_keys_are_spread() -> None:
    fabric = fabric_of(4)
    places: dict[str, set[str]] = {}
    for number in range(24):
        fabric.submit("alice", number, affinity=f"s{number % 8}")
        places.setdefault(f"s{number % 8}", set()).add(where(fabric, number))
    assert all(len(names) == 1 for names in places.values())
    assert Counter(name for names in places.values() for name in names) == {f"w{n}": 2 for n in range(4)}


def test_a_key_leaves_a_host_that_passes_both_thresholds() -> None:
    fabric = fabric_of(2, imbalance_requests=3, imbalance_ratio=2.0)
    for number in range(4):
        fabric.submit("alice", number, affinity="s")
    assert len({where(fabric, number) for number in range(4)}) == 1
    home = where(fabric, 0)
    fabric.submit("alice", 4, affinity="s")
    assert where(fabric, 4) != home, "four more than none is more than three more"
    fabric.submit("alice", 5, affinity="s")
    assert where(fabric, 5) == where(fabric, 4), "the key has moved"


def test_either_threshold_alone_moves_nothing() -> None:
    rng, candidates = random.Random(1), Candidates()
    busy, idle = Host("busy", 1.0, 0), Host("idle", 1.0, 0)
    for host in (busy, idle):
        candidates.add(host, rng)
    loads = {(4, 0): busy, (12, 4): idle, (30, 20): busy, (9, 0): idle}
    for (busy.line.length, idle.line.length), expected in loads.items():
        ask = Ask(candidates, rng, affinity="s", held=busy, imbalance_requests=4, imbalance_ratio=1.5)
        assert sticky_least_loaded(ask) is expected


def test_a_key_leaves_a_host_that_is_full_or_drains_or_is_gone() -> None:
    fabric = fabric_of(2, slots=1)
    fabric.submit("alice", 0, affinity="s")
    home = where(fabric, 0)
    fabric.submit("alice", 1, affinity="s")
    assert where(fabric, 1) != home, "no request waits while a worker has a slot free"
    fabric.end(home, "alice", 0)
    fabric.end(where(fabric, 1), "alice", 1)
    other = where(fabric, 1)
    fabric.load(other, draining=True)
    fabric.submit("alice", 2, affinity="s")
    assert where(fabric, 2) == home
    fabric.end(home, "alice", 2)
    fabric.lose(home)
    fabric.worker("fresh", model())
    fabric.submit("alice", 3, affinity="s")
    assert where(fabric, 3) == "fresh"


def test_a_released_key_is_new_again() -> None:
    fabric = fabric_of(2)
    fabric.submit("alice", 0, affinity="s")
    home = where(fabric, 0)
    assert fabric.query("alice", "release", affinity="s") is True
    assert fabric.query("alice", "release", affinity="s") is False
    fabric.submit("alice", 1, affinity="s")
    assert where(fabric, 1) != home


def test_the_thresholds_are_set_at_run_time() -> None:
    fabric = fabric_of(2)
    fabric.client("operator")
    for name, value in (("imbalance_requests", 1), ("imbalance_ratio", 1)):
        assert fabric.query("operator", "set_config", name=name, value=value)["value"] == value
    for number in range(3):
        fabric.submit("alice", number, affinity="s")
    assert len({where(fabric, number) for number in range(3)}) == 2


def host_of(fabric: FakeFabric, name: str) -> Hosting:
    return fabric.broker.registry.workers[name].hosts["m"]


def test_the_table_is_bounded_and_forgets() -> None:
    fabric = fabric_of(1)
    host, table = host_of(fabric, "w0"), Affinities()
    for number in range(AFFINITIES_MAX + 5):
        table.note(str(number), host, 0)
    assert len(table) == AFFINITIES_MAX
    assert table.find("4", host.model, 0) is None
    assert table.find("5", host.model, 0) is host
    later_ns = AFFINITY_TTL_MS * 1_000_000
    assert table.find("5", host.model, later_ns) is None
    table.note("new", host, later_ns)
    assert len(table) == 1


def test_one_key_of_many_models_is_bounded() -> None:
    fabric = FakeFabric()
    fabric.worker("w", *(model(f"m{n}") for n in range(AFFINITY_MODELS_MAX + 1)))
    hosts, table = list(fabric.broker.registry.workers["w"].hosts.values()), Affinities()
    for host in hosts:
        table.note("s", host, 0)
    assert [table.find("s", host.model, 0) for host in hosts] == [None, *hosts[1:]]
    assert table.release("s", lambda name: name == "m1")
    assert table.find("s", hosts[1].model, 0) is None
    assert table.find("s", hosts[2].model, 0) is hosts[2]


def test_a_new_controller_learns_keys_from_what_is_claimed() -> None:
    bench = Bench(recovery_ms=3_000, policy=STICKY)
    client = bench.client(11)
    home = bench.worker("home", slots=10)
    bench.worker("other", slots=10)
    home.carry(carried_of(11, 7))
    client.send(Claims([Claim(request=7, attempt=0, next=0, window=10, model="m", affinity="s")]))
    client.submit(8, affinity="s")
    assert [it.request for it in home.dispatched()] == [8]


def ask_of(hosts: list[Host], key: str) -> Ask:
    rng, candidates = random.Random(1), Candidates()
    for host in hosts:
        candidates.add(host, rng)
    return Ask(candidates, rng, affinity=key)


@pytest.mark.parametrize("count", [5, 40])
def test_hashing_agrees_moves_little_and_follows_speed(count: int) -> None:
    hosts = [Host(f"w{n}", 1.0 + n % 2, 0) for n in range(count)]
    keys = [f"key {n}" for n in range(3_000)]
    before = {key: consistent_hash(ask_of(hosts, key)) for key in keys}
    assert before == {key: consistent_hash(ask_of(hosts[::-1], key)) for key in keys}, "whatever order hosts came in"
    after = {key: consistent_hash(ask_of(hosts[1:], key)) for key in keys}
    assert all(after[key] is host for key, host in before.items() if host is not hosts[0])
    shares = Counter(host.speed for host in before.values() if host is not None)
    fast = sum(host.speed for host in hosts if host.speed == 2.0) / sum(host.speed for host in hosts)
    assert shares[2.0] / len(keys) == pytest.approx(fast, abs=0.03)


def test_hashing_passes_over_who_has_more_than_the_bound() -> None:
    hosts = [Host(f"w{n}", 1.0, 0) for n in range(10)]
    for sent in range(1, 201):
        host = consistent_hash(ask_of(hosts, "one key"))
        assert host is not None
        host.line.length += 1
        assert host.load <= -(-HASH_LOAD_RATIO * sent // 10)
    assert min(host.load for host in hosts) == 0, "the bound leaves room, so not all are needed"


def test_hashing_without_a_key_or_speed_leaves_the_choice_to_load() -> None:
    busy, idle = Host("busy", 1.0, 0), Host("idle", 1.0, 0)
    busy.line.length = 3
    assert consistent_hash(ask_of([busy, idle], "")) is idle
    slow = Host("slow", 0.0, 0)
    assert consistent_hash(ask_of([slow], "s")) is slow


def test_a_key_that_is_too_long_is_refused() -> None:
    from zfabric.client.requests import affinity_key

    with pytest.raises(ParameterRangeError, match="length of affinity is 65, it must be 0 … 64"):
        affinity_key("s" * 65)
