"""A policy that fails costs nobody anything but its choice, and nothing that a peer announces makes one fail."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.peers import FakeFabric, model
from zfabric.core.controller.candidates import Candidates, Host
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import POLICIES, Ask, Chooser, register_policy
from zfabric.errors import ConfigurationError, ProtocolError
from zfabric.limits import POLICY_REPORT_MS, SPEED_MAX
from zfabric.testing.checkers import check_bounds
from zfabric.wire import codec, kinds
from zfabric.wire.load import Load
from zfabric.worker.config import WorkerConfig

#: Settings of which 0 means never.
MAY_BE_ZERO = ("recovery_ms", "circuit_failures", "adapters_per_host")

NOT_NUMBERS = [math.inf, -math.inf, math.nan]


def raises(ask: Ask) -> Host:
    raise ZeroDivisionError("no speed")


def raises_nonsense(ask: Ask) -> Host:
    class Mute(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise ValueError

    raise Mute


kept: list[Host] = []


def returns_a_former_one(ask: Ask) -> Host:
    kept.append(ask.candidates[0])
    return kept[0]


BROKEN: dict[str, Callable[[Ask], Any]] = {
    "raises": raises,
    "raises_nonsense": raises_nonsense,
    "returns_a_former_one": returns_a_former_one,
    "returns_a_stranger": lambda ask: Host("w0", 1.0, 0),
    "returns_text": lambda ask: "w0",
    "returns_a_list": lambda ask: list(ask.candidates),
    "returns_nothing": lambda ask: None,
    "recurses": lambda ask: BROKEN["recurses"](ask),
}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    kept.clear()
    register_policy(request.param, BROKEN[request.param])
    yield request.param
    del POLICIES[request.param]


def test_a_broken_policy_is_replaced_for_each_choice(broken: str) -> None:
    fabric = FakeFabric(policy=broken)
    told: list[tuple[str, int]] = []
    fabric.broker.scheduler.chooser.on_failure = lambda what, times: told.append((what, times))
    fabric.client("alice")
    for number in range(3):
        fabric.worker(f"w{number}", model(), model(f"own-{number}"), slots=2)
    for number in range(6):
        fabric.submit("alice", number)
        check_bounds(fabric.broker)
    assert [len(fabric.dispatches[f"w{number}"]) for number in range(3)] == [2, 2, 2]
    fabric.submit("alice", 6)
    fabric.lose("w0")
    fabric.leave("alice")
    assert not fabric.waiting()
    assert not fabric.broker.registry.clients
    # To return nothing is to have no wish, and a former candidate is one until both of its slots are taken.
    failures = {"returns_nothing": 0, "returns_a_former_one": 4}.get(broken, 6)
    assert fabric.broker.scheduler.chooser.failures == failures
    assert len(told) == bool(failures)
    assert all(broken in what for what, _ in told)


def test_a_broken_policy_is_told_of_once_in_a_while() -> None:
    register_policy("broken", raises)
    try:
        chooser = Chooser("broken")
    finally:
        del POLICIES["broken"]
    told: list[tuple[str, int]] = []
    chooser.on_failure = lambda what, times: told.append((what, times))
    candidates = Candidates()
    candidates.add(Host("h", 1.0, 0), random.Random(1))
    for second in range(2 * POLICY_REPORT_MS // 1_000 + 1):
        chooser.choose(Ask(candidates, random.Random(1)), second * 1_000_000_000)
    assert [times for _, times in told] == [1, 60, 60]
    assert told[0][0] == "policy 'broken' raised ZeroDivisionError: no speed"
    assert chooser.failures == 121


def test_what_is_no_function_is_no_policy() -> None:
    with pytest.raises(ConfigurationError, match="'constant' is a int, not a function"):
        register_policy("constant", 5)  # type: ignore[arg-type]


def test_the_lottery_of_workers_without_speed_is_won_by_somebody() -> None:
    fabric = FakeFabric(policy="lottery")
    fabric.client("alice")
    for number in range(20):
        fabric.worker(f"w{number}", model(), speed=0.0)
    for number in range(20):
        fabric.submit("alice", number)
    assert not fabric.waiting()
    assert fabric.broker.scheduler.chooser.failures == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("speeds", [(0.0, 5e-324), (SPEED_MAX, 5e-324), (SPEED_MAX, SPEED_MAX)])
def test_extreme_speeds_are_fine(policy: str, speeds: tuple[float, float]) -> None:
    fabric = FakeFabric(policy=policy)
    fabric.client("alice")
    for number in range(40):
        fabric.worker(f"w{number}", model(), speed=speeds[number % 2], slots=2)
    for number in range(80):
        fabric.submit("alice", number)
    assert not fabric.waiting()
    assert fabric.broker.scheduler.chooser.failures == 0


def test_a_fast_worker_that_left_does_not_make_draws_dear() -> None:
    candidates, rng = Candidates(), random.Random(3)
    fast = Host("fast", 1e6, 0)
    for each in [fast, *(Host(f"h{n}", 1.0 + n % 2, 0) for n in range(40))]:
        candidates.add(each, rng)
    candidates.remove(fast)
    drawn = Counter(host.speed for _ in range(6_000) if (host := candidates.by_speed(rng)) is not None)
    assert candidates._speed_max == 2.0
    assert drawn[2.0] / 6_000 == pytest.approx(2 / 3, abs=0.03)


def test_a_new_speed_counts_at_once() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("slow", model(), slots=10)
    fabric.worker("fast", model(), slots=10)
    fabric.worker("fast", model(), slots=10, speed=9.0, again=True)
    for number in range(10):
        fabric.submit("alice", number)
    assert len(fabric.dispatches["fast"]) == 9


@pytest.mark.parametrize("speed", [*NOT_NUMBERS, -1.0, 2 * SPEED_MAX])
def test_a_speed_that_cannot_be_added_up_is_refused_everywhere(speed: float) -> None:
    with pytest.raises(ConfigurationError, match="speed is"):
        WorkerConfig(endpoint="ipc:///tmp/unused.sock", speed=speed)
    fabric = FakeFabric()
    fabric.worker("w", model(), speed=speed)
    assert fabric.refusals == [ProtocolError]
    assert not fabric.broker.registry.workers


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("field", ["tokens_per_second", "gauges"])
def test_figures_that_are_no_numbers_are_refused(field: str, value: float) -> None:
    fabric = FakeFabric()
    fabric.worker("w", model())
    load = Load(slots=1, **{field: value if field == "tokens_per_second" else {"hit_rate": value}})  # type: ignore[arg-type]
    fabric._receive("w", codec.pack(load))
    assert fabric.faults == [ProtocolError]
    assert fabric.broker.registry.workers["w"].load.gauges == {}
    fabric.worker("v", msgspec.structs.replace(model(), details={"dtype": "bfloat16", "gigabytes": value}))
    assert fabric.refusals == [ProtocolError]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -1, 0])
@pytest.mark.parametrize("name", [n for n in BrokerConfig.__dataclass_fields__ if n not in ("policy", *MAY_BE_ZERO)])
def test_bounds_and_timings_are_numbers(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is"):
        BrokerConfig(**{name: value})  # type: ignore[arg-type]


def test_integers_are_numbers_of_the_wire_too() -> None:
    """MessagePack writes 1 for 1.0 in many a language."""
    header, _ = codec.pack(Load(slots=1, tokens_per_second=3, gauges={"free": 7}))
    load = codec.unpack_control(header)
    assert (load.tokens_per_second, load.gauges) == (3.0, {"free": 7.0})
    assert header[0] == kinds.LOAD
