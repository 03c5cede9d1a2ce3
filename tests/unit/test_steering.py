"""What operators change while a controller runs: what it does at once, what holds, and what everybody is told of it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tests.broker import Bench, FakeClient
from tests.peers import FakeFabric, model
from zfabric.core.controller.access import Grant, Role
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.directives import Pause
from zfabric.errors import (
    ConfigurationError,
    NoWorkerError,
    ParameterRangeError,
    PermissionDeniedError,
    QuotaExceededError,
    RequestError,
    StoppedByOperatorError,
    UnknownModelError,
    UnsupportedOperationError,
)
from zfabric.limits import DIRECTIVES_MAX, UNTAKEN_MS
from zfabric.wire.messages import Drain


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric()
    made.client("alice")
    made.client("operator", label="olga")
    return made


def order(fabric: FakeFabric, what: str, **arguments: Any) -> Any:
    return fabric.query("operator", what, **arguments)


def told(fabric: FakeFabric) -> list[tuple[str, dict[str, object]]]:
    return [(entry.event, entry.fields) for entry in fabric.broker.journal.take()]


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_paused_models_requests_wait_and_go_when_it_is_resumed(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", aliases=["n"]), model("o"), slots=4)
    fabric.submit("alice", 1)
    assert order(fabric, "pause", model="n") == "m"
    fabric.submit("alice", 2)
    fabric.submit("alice", 3, model="n")
    fabric.submit("alice", 4, model="o")
    assert fabric.taken("w") == [1, 4]
    assert {row["request"]: row["reason"] for row in order(fabric, "requests")["rows"]} == {
        "1": "", "2": "paused", "3": "paused", "4": "",
    }  # fmt: skip
    (row,) = [row for row in order(fabric, "models") if row["name"] == "m"]
    assert (row["paused_by"], row["queued"]) == ("olga", 2)
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == []
    assert order(fabric, "resume", model="m") == "m"
    assert fabric.taken("w") == [2, 3]
    events = [entry for entry in told(fabric) if entry[0].startswith("model_")]
    assert events == [
        ("model_paused", {"model": "m", "by": "olga", "wait_ms": UNTAKEN_MS, "queued": 0}),
        ("model_resumed", {"model": "m", "by": "olga", "queued": 2}),
    ]


def test_a_pause_holds_while_workers_come_and_go(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    order(fabric, "pause", model="m", wait_ms=600_000)
    fabric.lose("w")
    fabric.submit("alice", 1)
    fabric.worker("w", model())
    fabric.worker("v", model())
    fabric.pass_ms(5 * UNTAKEN_MS, "w", "v")
    assert fabric.taken("w") + fabric.taken("v") == []
    assert not fabric.ended("alice")
    order(fabric, "resume", model="m")
    assert fabric.taken("w") + fabric.taken("v") == [1]


@pytest.mark.parametrize("wait_ms", [0, 1_000, UNTAKEN_MS])
def test_a_pause_refuses_when_its_time_to_wait_is_over(fabric: FakeFabric, wait_ms: int) -> None:
    """What waits ends with the operator's name, and what comes later is refused at once, until it is resumed."""
    fabric.worker("w", model())
    order(fabric, "pause", model="m", wait_ms=wait_ms)
    fabric.submit("alice", 1)
    fabric.pass_ms(max(0, wait_ms - 100), "w")
    assert bool(fabric.ended("alice")) is (wait_ms == 0)
    fabric.pass_ms(300, "w")
    fabric.submit("alice", 2)
    ends = fabric.terminals.pop("alice")
    assert [it.request for it in ends][-1] == 2
    assert all((it.error, it.details["by"]) == (NoWorkerError, "olga") for it in ends)
    order(fabric, "resume", model="m")
    fabric.submit("alice", 3)
    assert fabric.taken("w") == [3]


def test_a_deadline_goes_on_and_says_what_it_waited_for(fabric: FakeFabric) -> None:
    bench = Bench()
    bench.worker()
    client = bench.client(11)
    client.ask("pause", model="m")
    client.submit(1, deadline_ms=500)
    bench.sleep(600)
    ((_, _, _, message, _),) = client.terminals()
    assert message == f"deadline passed while the request was queued: model 'm' is paused by operator '{client.number}'"


def test_what_nobody_serves_cannot_be_paused(fabric: FakeFabric) -> None:
    assert order(fabric, "pause", model="m").code == UnknownModelError.code
    assert order(fabric, "resume", model="m").code == UnknownModelError.code
    fabric.worker("w", model())
    assert order(fabric, "resume", model="m") == "m"
    assert order(fabric, "pause", model="m", wait_ms=-1).code == ParameterRangeError.code
    assert order(fabric, "pause", model="m", wait_ms="long").code == ParameterRangeError.code
    paused = fabric.broker.registry.directives.paused
    paused.update({str(number): Pause("olga", 0) for number in range(DIRECTIVES_MAX)})
    assert order(fabric, "pause", model="m").code == QuotaExceededError.code


# ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_is_to_stay_gets_nothing_new_until_it_is_undrained(fabric: FakeFabric) -> None:
    fabric.worker("w", model(), slots=2)
    fabric.submit("alice", 1)
    assert order(fabric, "drain", worker="w", stay=True) == "w"
    fabric.submit("alice", 2)
    assert fabric.taken("w") == [1]
    assert not [message for message in fabric.sent["w"] if isinstance(message, Drain)]
    (row,) = order(fabric, "workers")
    assert (row["state"], row["drained_by"]) == ("draining", "olga")
    fabric.load("w", slots=2)
    fabric.lose("w")
    fabric.worker("w", model(), slots=2)
    assert order(fabric, "workers")[0]["state"] == "draining"
    assert fabric.taken("w") == []
    assert order(fabric, "undrain", worker="w") == "w"
    assert fabric.taken("w") == [2]
    assert [event for event, _ in told(fabric) if "drain" in event] == [
        "worker_draining", "worker_draining", "worker_undrained",
    ]  # fmt: skip


def test_a_worker_that_leaves_can_be_told_to_stay(fabric: FakeFabric) -> None:
    """Its report that it drains may be on its way when it is told, and that it does not drain comes behind that."""
    fabric.worker("w", model())
    order(fabric, "drain", worker="w", limit_ms=5)
    fabric.load("w", draining=True)
    fabric.submit("alice", 1)
    assert fabric.taken("w") == []
    order(fabric, "undrain", worker="w")
    assert [message for message in fabric.sent["w"] if isinstance(message, Drain)] == [
        Drain(5),
        Drain(0, withdrawn=True),
    ]
    fabric.load("w", draining=True)
    assert fabric.taken("w") == []
    fabric.load("w", draining=False)
    assert fabric.taken("w") == [1]


def test_a_worker_of_an_older_version_cannot(fabric: FakeFabric) -> None:
    fabric.worker("w", model(), minor=0)
    order(fabric, "drain", worker="w")
    answer = order(fabric, "undrain", worker="w")
    assert (answer.code, "2.0" in answer.message) == (UnsupportedOperationError.code, True)
    assert order(fabric, "workers")[0]["state"] == "draining"


def test_a_hold_may_be_taken_back_while_its_worker_is_away(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    order(fabric, "drain", worker="w", stay=True)
    fabric.lose("w")
    assert order(fabric, "undrain", worker="w") == "w"
    assert order(fabric, "undrain", worker="w").code == NoWorkerError.code
    fabric.worker("w", model())
    assert order(fabric, "workers")[0]["state"] == "ready"


# ── requests and clients ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cancelled_request_ends_at_once_wherever_it_is(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 0xA1, deadline_ms=60_000)
    fabric.submit("alice", 0xA2)
    for name in ("a2", "a1"):
        assert order(fabric, "cancel", request=name)["requests"] == [name]
    ends = fabric.terminals.pop("alice")
    assert [(it.request, it.error, it.details) for it in ends] == [
        (0xA2, StoppedByOperatorError, {"by": "olga"}),
        (0xA1, StoppedByOperatorError, {"by": "olga"}),
    ]
    assert fabric.broker.scheduler.figures.total("cancelled") == 2
    assert [row["state"] for row in order(fabric, "requests")["rows"]] == ["orphaned"]
    fabric.end("w", "alice", 0xA1, code=49901)
    fabric.pass_ms(70_000, "w")
    assert not fabric.ended("alice")
    assert [fields["state"] for event, fields in told(fabric) if event == "request_cancelled"] == ["queued", "running"]


def test_whose_request_it_is_has_to_be_said_where_several_have_one(fabric: FakeFabric) -> None:
    fabric.client("bob", label="bob")
    for client in ("alice", "bob"):
        fabric.submit(client, 7, model="m")
    fabric.worker("w", model())
    for client in ("alice", "bob"):
        fabric.submit(client, 7)
    assert "say of which" in order(fabric, "cancel", request="7").message
    assert order(fabric, "cancel", request="7", client="bob")["client"] == "bob"
    assert order(fabric, "cancel", request="8").code == RequestError.code
    assert "hexadecimal" in order(fabric, "cancel", request="xyz").message


@pytest.mark.parametrize("at", ["queue", "worker"])
def test_a_client_that_is_away_is_told_when_it_claims(at: str) -> None:
    """It must not take the cancelled request for a lost one, and ask for it again."""
    bench = Bench()
    operator = bench.client(12)
    worker = bench.worker(slots=1)
    client = bench.client(11, secret=b"s")
    if at == "queue":
        operator.submit(9)
    client.submit(1)
    client.cut()
    operator.ask("cancel", request="1")
    assert worker.aborted() == ([(1, 0)] if at == "worker" else [])
    back = client.back((1, 0, 0))
    ((request, attempt, code, _, details),) = back.terminals()
    assert (request, attempt, code) == (1, 0, StoppedByOperatorError.code)
    assert details == {"by": str(operator.number)}


def test_a_kicked_client_is_gone_and_kept_out_for_a_time() -> None:
    bench = Bench()
    operator, client = bench.client(12), FakeClient(bench)
    client.hello(11, secret=b"s")
    worker = bench.worker(slots=1)
    client.submit(1)
    client.submit(2)
    number = str(client.number)
    (answer,) = operator.ask("kick", client=number, refuse_ms=5_000)
    assert msgspec.msgpack.decode(answer.result)["requests"] == ["1", "2"]
    assert client.codes() == {(1, 0): StoppedByOperatorError.code, (2, 0): StoppedByOperatorError.code}
    assert worker.aborted() == [(1, 0)]
    assert client.refusal == PermissionDeniedError.code
    assert bench.broker.registry.clients.keys() == {12}
    client.submit(3)
    assert client.kinds()[-1] == "UNKNOWN_SESSION"
    client.hello(11, secret=b"s")
    assert bench.broker.registry.clients.keys() == {12}
    bench.sleep(5_000)
    client.hello(11, secret=b"s")
    client.submit(4)
    worker.dispatched()
    assert bench.broker.registry.clients.keys() == {11, 12}
    assert bench.broker.registry.directives.kicked == {}


def test_several_clients_of_one_label_are_named_by_number(fabric: FakeFabric) -> None:
    fabric.client("bob", label="twin")
    fabric.client("carol", label="twin")
    numbers = [str(fabric.broker.registry.clients[fabric.instances[name]].number) for name in ("bob", "carol")]
    answer = order(fabric, "kick", client="twin")
    assert answer.code == RequestError.code
    assert all(number in answer.message for number in numbers)
    assert order(fabric, "kick", client=numbers[0])["number"] == int(numbers[0])
    assert order(fabric, "kick", client="nobody").code == RequestError.code


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_say_what_can_be_changed_and_why_others_cannot(fabric: FakeFabric) -> None:
    fabric.worker("w", model(), speed=2.0)
    rows = {row["name"]: row for row in order(fabric, "config")}
    assert rows.keys() == {*BrokerConfig.__dataclass_fields__, "speed.w", "weight.m"}
    assert {name for name, row in rows.items() if not row["changeable"]} == {"beat_ms", "lease_ms", "recovery_ms"}
    assert all(row["why"] for row in rows.values())
    assert (rows["speed.w"]["value"], rows["speed.w"]["default"]) == (2.0, 2.0)


def test_a_bound_holds_from_now_on(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    assert order(fabric, "set_config", name="queue_depth_max", value=1)["changed_by"] == "olga"
    fabric.submit("alice", 2)
    fabric.submit("alice", 3)
    assert [request for request, _ in fabric.ended("alice")] == [3]
    order(fabric, "set_config", name="queue_depth_max", value=None)
    fabric.submit("alice", 4)
    assert not fabric.ended("alice")
    assert [fields for event, fields in told(fabric) if event == "config_changed"] == [
        {"setting": "queue_depth_max", "former": 16_384, "now": 1, "by": "olga"},
        {"setting": "queue_depth_max", "former": 1, "now": 16_384, "by": "olga"},
    ]


def test_a_policy_decides_from_now_on_and_figures_tell_them_apart(fabric: FakeFabric) -> None:
    for name in ("w", "v"):
        fabric.worker(name, model(), slots=10)
    for number in range(4):
        fabric.submit("alice", number)
    order(fabric, "set_config", name="policy", value="round_robin")
    for number in range(4, 10):
        fabric.submit("alice", number)
    assert [len(fabric.taken(name)) for name in ("w", "v")] == [5, 5]
    figures = fabric.broker.scheduler.figures
    assert figures.dispatched == 10
    counts = figures.by_policy("round_robin")
    assert (counts["shortest_queue", "chosen"], counts["round_robin", "chosen"]) == (4, 6)


def test_a_speed_weighs_from_now_on_and_when_the_worker_comes_back(fabric: FakeFabric) -> None:
    for name in ("w", "v"):
        fabric.worker(name, model(), slots=100)
    order(fabric, "set_config", name="speed.w", value=3)
    for number in range(40):
        fabric.submit("alice", number)
    assert [len(fabric.taken(name)) for name in ("w", "v")] == [30, 10]
    fabric.worker("w", model(), slots=100, again=True)
    fabric.lose("w")
    fabric.worker("w", model(), slots=100)
    assert order(fabric, "workers")[1]["speed"] == 3.0
    order(fabric, "set_config", name="speed.w", value=None)
    assert order(fabric, "workers")[1]["speed"] == 1.0


def test_a_weight_holds_when_its_model_was_gone(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    assert order(fabric, "set_config", name="weight.m", value=3)["value"] == 3
    fabric.leave("w")
    fabric.pass_ms(10 * UNTAKEN_MS)
    assert order(fabric, "set_config", name="weight.m", value=3).code == UnknownModelError.code
    fabric.worker("v", model())
    assert fabric.broker.registry.models["m"].queue.weight == 3
    assert order(fabric, "set_config", name="weight.m", value=None)["value"] == 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("beat_ms", 500, "each peer was told"),
        ("queue_dept_max", 5, "did you mean queue_depth_max?"),
        ("colour", "red", "no setting 'colour'"),
        ("queue_depth_max", 0, "at least 1"),
        ("queue_depth_max", "many", "must be an integer"),
        ("queue_depth_max", True, "must be an integer"),
        ("policy", "best", "is not one of"),
        ("policy", 5, "must be a name"),
        ("speed.w", -1, "must be a number"),
        ("speed.w", "fast", "must be a number"),
        ("weight.m", 0, "must be an integer 1 … 100"),
        ("weight.m", 1.5, "must be an integer 1 … 100"),
    ],
)
def test_what_cannot_be_set_is_said_and_changes_nothing(
    fabric: FakeFabric, name: str, value: object, says: str
) -> None:
    fabric.worker("w", model())
    before = order(fabric, "config")
    answer = order(fabric, "set_config", name=name, value=value)
    assert answer.code == ConfigurationError.code
    assert says in answer.message
    assert order(fabric, "config") == before
    assert not [event for event, _ in told(fabric) if event == "config_changed"]


def test_a_brokers_configuration_is_its_own() -> None:
    config = BrokerConfig(recovery_ms=0)
    fabric = FakeFabric()
    fabric.broker = type(fabric.broker)(config, random.Random(1), 0)
    fabric.client("operator")
    order(fabric, "set_config", name="stall_ms", value=5)
    assert (config.stall_ms, fabric.broker.config.stall_ms) == (BrokerConfig().stall_ms, 5)


# ── who may ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ORDERS: dict[str, dict[str, Any]] = {
    "drain": {"worker": "w"},
    "undrain": {"worker": "w"},
    "pause": {"model": "m"},
    "resume": {"model": "m"},
    "cancel": {"request": "1"},
    "kick": {"client": "1"},
    "config": {},
    "set_config": {"name": "stall_ms", "value": 5},
    "refresh": {},
}


@pytest.mark.parametrize("what", ORDERS)
def test_only_an_operator_may(what: str) -> None:
    bench = Bench()
    bench.worker()
    client = bench.key_holder(Grant("backend", frozenset({Role.CLIENT}))).hello(11)
    client.submit(1)
    (answer,) = client.ask(what, **ORDERS[what])
    assert answer.code == PermissionDeniedError.code
    assert "'backend'" in answer.message
    operator = bench.key_holder(Grant("admin", frozenset({Role.OPERATOR}))).hello(12)
    arguments = {"client": str(client.number)} if what == "kick" else ORDERS[what]
    (answer,) = operator.ask(what, **arguments)
    assert answer.code == 0
    by = {entry.fields["by"] for entry in bench.broker.journal.take() if "by" in entry.fields}
    assert by <= {"admin", "operator admin"}
