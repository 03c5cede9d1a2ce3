"""A host whose requests fail one after the other gets none for a while, then one at a time, and is never the last that is out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.peers import FakeFabric, model
from zfabric.core.controller.circuits import COUNTED_CODES, Circuit
from zfabric.core.controller.dispatch import BUILT_IN
from zfabric.errors import (
    BY_CODE,
    BackendError,
    ContextOverflowError,
    DeadlineExceededError,
    OutOfMemoryError,
    ParameterRangeError,
    QuotaExceededError,
    RequestCancelledError,
    WorkerDrainingError,
    WorkerTimeoutError,
)
from zfabric.limits import CIRCUIT_FAILURES, CIRCUIT_JITTER, CIRCUIT_OPEN_MS, CIRCUIT_OPEN_MS_MAX
from zfabric.testing.checkers import check_bounds, check_circuits, check_liveness

FAILS = BackendError.code


class Fleet:
    """Workers of one model, of which some fail at once, and one client."""

    def __init__(self, count: int, *, slots: int = 8, **settings: Any) -> None:
        self.fabric = FakeFabric(**settings)
        self.fabric.client("alice")
        self.names = [f"w{number}" for number in range(count)]
        for name in self.names:
            self.fabric.worker(name, model(), slots=slots)
        self.number = 0

    def circuit(self, name: str) -> Circuit | None:
        return self.fabric.broker.registry.workers[name].hosts["m"].circuit

    def state(self, name: str) -> str:
        circuit = self.circuit(name)
        return "closed" if circuit is None else circuit.state

    def ask(self) -> str:
        """Make a request. Returns where it went, "" for nowhere yet."""
        self.number += 1
        self.fabric.submit("alice", self.number)
        found = [name for name in self.names if self.number in [it.request for it in self.fabric.dispatches[name]]]
        return found[0] if found else ""

    def end(self, name: str, code: int = 0) -> None:
        """The worker ends the oldest of what it has."""
        dispatch = self.fabric.dispatches[name].pop(0)
        self.fabric.end(name, "alice", dispatch.request, dispatch.attempt, code)
        self.check()

    def fail(self, name: str, times: int, code: int = FAILS) -> None:
        """So many requests fail at a worker, wherever others go."""
        while times:
            where = self.ask()
            times -= where == name
            self.end(where, code if where == name else 0)

    def check(self) -> None:
        check_bounds(self.fabric.broker)
        check_circuits(self.fabric.broker)
        check_liveness(self.fabric.broker, self.names)

    def told(self, event: str) -> list[dict[str, object]]:
        return [entry.fields for entry in self.fabric.broker.journal.pending if entry.event == event]


@pytest.mark.parametrize("policy", BUILT_IN)
def test_a_worker_that_fails_at_once_draws_no_traffic(policy: str) -> None:
    fleet = Fleet(4, policy=policy)
    taken: Counter[str] = Counter()
    for _ in range(320):
        name = fleet.ask()
        taken[name] += 1
        if name == "w0":
            fleet.end("w0", FAILS)
        elif taken[name] % 8 == 0:
            while fleet.fabric.dispatches[name]:
                fleet.end(name)
        if not any(host.open for host in fleet.fabric.broker.registry.models["m"].hosts.values()):
            for other in fleet.names[1:]:
                while fleet.fabric.dispatches[other]:
                    fleet.end(other)
    assert taken["w0"] == CIRCUIT_FAILURES
    assert fleet.state("w0") == "open"


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    fleet = Fleet(2, policy="round_robin")
    fleet.fail("w0", CIRCUIT_FAILURES - 1)
    fleet.fail("w0", 1, code=0)
    fleet.fail("w0", CIRCUIT_FAILURES - 1)
    assert fleet.state("w0") == "closed"
    fleet.fail("w0", 1)
    assert fleet.state("w0") == "open"
    (told,) = fleet.told("circuit_opened")
    assert (told["worker"], told["model"], told["failures"]) == ("w0", "m", CIRCUIT_FAILURES)
    assert {fleet.ask() for _ in range(8)} == {"w1"}


def test_half_open_it_takes_one_at_a_time_until_one_succeeds() -> None:
    fleet = Fleet(2)
    fleet.fail("w0", CIRCUIT_FAILURES)
    fleet.fabric.pass_ms(CIRCUIT_OPEN_MS * (1 + CIRCUIT_JITTER), *fleet.names)
    assert fleet.state("w0") == "half open"
    places = Counter(fleet.ask() for _ in range(9))
    assert places == {"w0": 1, "w1": 8}
    assert fleet.ask() == "", "it waits, since the try still runs"
    fleet.end("w0")
    assert fleet.state("w0") == "closed"
    assert [it.request for it in fleet.fabric.dispatches["w0"]] == [fleet.number], "what waited follows at once"
    assert len(fleet.told("circuit_closed")) == 1


def test_each_failed_try_doubles_its_time_up_to_a_bound() -> None:
    fleet = Fleet(2)
    fleet.fail("w0", CIRCUIT_FAILURES)
    for _ in range(8):
        circuit = fleet.circuit("w0")
        assert circuit is not None
        assert circuit.timer is not None
        wait_ms = (circuit.timer.due_ns - fleet.fabric.now_ns) / 1e6
        fleet.fabric.pass_ms(wait_ms, *fleet.names)
        fleet.fail("w0", 1)
    times: list[Any] = [told["open_ms"] for told in fleet.told("circuit_opened")]
    for count, open_ms in enumerate(times):
        expected = min(CIRCUIT_OPEN_MS * 2**count, CIRCUIT_OPEN_MS_MAX)
        assert abs(open_ms - expected) <= CIRCUIT_JITTER * expected
    assert len(set(times)) == len(times), "drawn, so that hosts do not come back together"


def test_a_cancelled_try_is_followed_by_another() -> None:
    fleet = Fleet(2, slots=1)
    fleet.fail("w0", CIRCUIT_FAILURES)
    fleet.fabric.pass_ms(CIRCUIT_OPEN_MS * (1 + CIRCUIT_JITTER), *fleet.names)
    places = [fleet.ask(), fleet.ask()]
    assert set(places) == {"w0", "w1"}
    fleet.ask()
    fleet.end("w0", RequestCancelledError.code)
    assert fleet.state("w0") == "half open"
    assert len(fleet.fabric.dispatches["w0"]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_never_are_more_than_half_of_them_out(count: int) -> None:
    fleet = Fleet(count, policy="round_robin")
    for _ in range(20 * count):
        fleet.end(fleet.ask(), FAILS)
    assert [fleet.state(name) for name in fleet.names].count("open") == count // 2


def test_who_is_out_comes_back_when_others_leave() -> None:
    fleet = Fleet(4, slots=1)
    for name in ("w0", "w1"):
        fleet.fail(name, CIRCUIT_FAILURES)
    assert [fleet.state(name) for name in fleet.names] == ["open", "open", "closed", "closed"]
    fleet.ask()
    fleet.ask()
    assert fleet.ask() == ""
    fleet.fabric.load("w3", draining=True)
    fleet.check()
    assert fleet.state("w0") == "closed", "of three only one may be out"
    assert [it.request for it in fleet.fabric.dispatches["w0"]] == [fleet.number]
    fleet.fabric.lose("w2")
    fleet.names.remove("w2")
    fleet.check()
    assert fleet.state("w1") == "open"
    fleet.fabric.lose("w0")
    fleet.names.remove("w0")
    fleet.check()
    assert fleet.state("w1") == "closed"


def test_what_is_no_fault_of_the_host_is_not_counted() -> None:
    innocent = (
        ContextOverflowError, ParameterRangeError, QuotaExceededError, DeadlineExceededError, WorkerDrainingError,
    )  # fmt: skip
    assert {kind.code for kind in (BackendError, OutOfMemoryError, WorkerTimeoutError)} == COUNTED_CODES
    assert BY_CODE.keys() >= COUNTED_CODES
    for kind in innocent:
        fleet = Fleet(2, policy="round_robin")
        fleet.fail("w0", 3 * CIRCUIT_FAILURES, kind.code)
        assert fleet.state("w0") == "closed"


def test_an_operator_turns_them_off() -> None:
    fleet = Fleet(2, policy="round_robin", circuit_failures=0)
    fleet.fail("w0", 3 * CIRCUIT_FAILURES)
    assert fleet.state("w0") == "closed"
    fleet.fabric.client("operator")
    assert fleet.fabric.query("operator", "set_config", name="circuit_failures", value=2)["value"] == 2
    fleet.fail("w0", 2)
    assert fleet.state("w0") == "open"


def test_operators_are_shown_them() -> None:
    fleet = Fleet(2, slots=1)
    fleet.fail("w0", CIRCUIT_FAILURES)
    rows = {row["name"]: row for row in fleet.fabric.query("alice", "workers")}
    assert (rows["w0"]["circuits"], rows["w1"]["circuits"]) == ({"m": "open"}, {})
    fleet.ask()
    fleet.ask()
    (row,) = fleet.fabric.query("alice", "queue")["rows"]
    assert "1 worker gets no more than a try, since requests failed there one after the other" in row["why"]


def test_a_worker_that_comes_back_begins_anew() -> None:
    fleet = Fleet(2)
    fleet.fail("w0", CIRCUIT_FAILURES)
    fleet.fabric.lose("w0")
    fleet.fabric.worker("w0", model())
    assert fleet.state("w0") == "closed"
    fleet.fabric.pass_ms(CIRCUIT_OPEN_MS_MAX, *fleet.names)
    fleet.check()


def test_least_latency_takes_an_unmeasured_host_for_the_mean_of_the_others() -> None:
    fleet = Fleet(3, policy="least_latency")
    hosts = fleet.fabric.broker.registry.models["m"].hosts
    hosts["w0"].latency_ns, hosts["w1"].latency_ns = 1e6, 3e6
    # The mean is 2 ms. Each would take 1, 3 and 2 ms, then 2, 3 and 2, of which the less loaded one goes first, then 2, 3, 4.
    assert [fleet.ask() for _ in range(3)] == ["w0", "w2", "w0"]


def test_a_failed_request_does_not_count_as_fast() -> None:
    fleet = Fleet(2, policy="round_robin")
    host = fleet.fabric.broker.registry.models["m"].hosts["w0"]
    host.latency_ns = 1e6
    fleet.fail("w0", 1)
    assert host.latency_ns == 1e6
