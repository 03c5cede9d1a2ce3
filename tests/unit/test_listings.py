"""Who waits, where and why: from the tables that dispatch goes by, bounded, and to each what concerns it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tests.broker import Bench
from tests.peers import FakeFabric, model
from zfabric.core.controller.access import Grant, Role
from zfabric.errors import ParameterRangeError, RequestError
from zfabric.limits import LISTED_DEFAULT, LISTED_MAX, STALL_MS
from zfabric.wire.flow import Credit, CreditLine
from zfabric.wire.load import Load, StreamUnits
from zfabric.wire.messages import Beat


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric()
    made.client("alice")
    made.client("bob")
    return made


def rows(fabric: FakeFabric, what: str = "requests", **wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fabric.query("alice", what, **wanted)["rows"]
    return found


def reasons(fabric: FakeFabric) -> list[tuple[str, str, str]]:
    return [(row["state"], row["reason"], row["why"]) for row in rows(fabric)]


def test_a_request_is_shown_with_all_that_is_known_of_it(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", aliases=["n"]))
    fabric.submit("alice", 0xAB, model="n")
    fabric.pass_ms(2_000, "w")
    fabric.submit("bob", 0xCD, model="m", priority=3, deadline_ms=10_000)
    fabric.pass_ms(1_000, "w")
    number = fabric.broker.registry.clients[fabric.instances["bob"]].number
    running, waiting = rows(fabric)
    assert (running["request"], running["state"], running["worker"], running["asked"]) == ("ab", "running", "w", "n")
    assert (running["model"], running["place"], running["age_s"], running["running_s"]) == ("m", None, 3.0, 3.0)
    assert (running["waited_s"], running["reason"], running["why"]) == (0.0, "", "")
    assert waiting == {
        "request": "cd", "attempt": 0, "client": str(number), "client_number": number, "operation": "generate",
        "model": "m", "asked": "m", "state": "queued", "priority": 3, "place": 1, "worker": "", "age_s": 1.0,
        "waited_s": 1.0, "running_s": None, "deadline_s": 9.0, "units": 0, "size": 1, "reason": "slots",
        "why": "all 1 slots of 1 worker are taken",
    }  # fmt: skip


def test_the_place_is_the_order_in_which_they_go(fabric: FakeFabric) -> None:
    """By priority, then by turns of clients, whatever the order in which they came, and after turns that were taken."""
    rng = random.Random(3)
    for _ in range(20):
        fabric = FakeFabric()
        for name in ("alice", "bob", "carol"):
            fabric.client(name)
        fabric.worker("w", model())
        fabric.submit("alice", 1_000)
        for number in range(1, 13):
            fabric.submit(rng.choice(["alice", "bob", "carol"]), number, priority=rng.choice([0, 0, 1]))
        fabric.taken("w")
        owners = {row["request"]: row["client_number"] for row in rows(fabric)}
        peers = {name: fabric.broker.registry.clients[fabric.instances[name]] for name in ("alice", "bob", "carol")}
        names = {peer.number: name for name, peer in peers.items()}
        fabric.end("w", "alice", 1_000)
        (first,) = fabric.taken("w")
        told = [int(row["request"], 16) for row in rows(fabric, sort="place", state="queued")]
        assert [row["place"] for row in rows(fabric, sort="place", state="queued")] == list(range(1, 12))
        served: list[int] = []
        current = first
        while told[len(served) :]:
            fabric.end("w", names[owners[f"{current:x}"]], current)
            (current,) = fabric.taken("w")
            served.append(current)
        assert served == told


@pytest.mark.parametrize("operation", ["generate", "embed"])
def test_why_nobody_takes_it(fabric: FakeFabric, operation: Any) -> None:
    fabric.worker("w", model(), slots=2)
    fabric.worker("v", model(), slots=0)
    fabric.submit("alice", 1, operation)
    fabric.submit("alice", 2, operation)
    fabric.submit("bob", 3, operation)
    assert reasons(fabric)[2] == ("queued", "slots", "all 2 slots of 1 worker are taken")
    fabric.cancel("alice", 1)
    assert reasons(fabric)[0][:2] == ("cancelling", "stopping")
    assert reasons(fabric)[2][2] == "all 2 slots of 1 worker are taken, 1 by requests that are being stopped"
    fabric.load("w", slots=2, draining=True)
    assert reasons(fabric)[2][1:] == (
        "not_taking",
        "no worker that could do it takes requests: 1 draining, 1 without slots",
    )
    fabric.leave("w")
    fabric.leave("v")
    ((state, reason, why),) = [row for row in reasons(fabric) if row[0] == "queued"]
    assert (state, reason, why) == ("queued", "no_worker", "no worker serves 'm' now")
    (queue,) = rows(fabric, "queue")
    assert (queue["waiting"], queue["workers"], queue["taking"], queue["free"]) == (1, 0, 0, 0)
    assert (queue["reason"], queue["why"], queue["ends_s"]) == ("no_worker", why, 30.0)


def test_which_capability_is_missing_is_said(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", "generate", "resume"))
    fabric.worker("v", model("m", "generate"))
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    fabric.submit("alice", 3, attempt=1, resume_from=4)
    fabric.lose("w")
    why = {row["request"]: row["why"] for row in rows(fabric, state="queued")}
    assert why["3"] == (
        "none of 1 worker of 'm' can go on with generate in mid-answer, and the one that could was lost and may come back"
    )


def test_stalled_engines_are_told(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    for _ in range(STALL_MS // 1_000 + 1):
        fabric.pass_ms(1_000, "w")
        fabric.load("w")
    fabric.submit("bob", 2)
    assert reasons(fabric)[-1] == (
        "queued", "not_taking", "no worker that could do it takes requests: 1 stalled",
    )  # fmt: skip


def test_a_new_controller_says_that_all_may_be_on_their_way() -> None:
    fabric = FakeFabric(recovery_ms=3_000)
    fabric.client("alice")
    fabric.submit("alice", 1)
    assert [reason for _, reason, _ in reasons(fabric)] == ["recovering"]
    fabric.pass_ms(4_000)
    assert reasons(fabric) == []


def test_halves_of_a_lost_connection_say_for_whom_they_wait() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(11, secret=b"s")
    operator = bench.client(12)
    client.submit(1)
    client.cut()

    def told() -> list[tuple[str, str]]:
        (answer,) = operator.ask("requests")
        return [(row["state"], row["reason"]) for row in msgspec.msgpack.decode(answer.result)["rows"]]

    assert told() == [("running", "client_away")]
    worker.end(11, (1, 0))
    assert told() == [("finished", "client_away")]
    back = client.back((1, 0, 0))
    assert told() == [("finished", "client_away")]
    worker.end(11, (1, 0), client=back.number)
    assert told() == []
    back.submit(2)
    worker.cut()
    back.claim((2, 0, 0))
    assert told() == [("claimed", "claimed")]


def test_lists_are_cut_and_say_what_they_leave_out(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m"), model("o"))
    for number in range(1, 151):
        fabric.submit("alice" if number % 3 else "bob", number, model="m" if number % 2 else "o")
    found = fabric.query("alice", "requests")
    assert (len(found["rows"]), found["total"], found["left_out"]) == (LISTED_DEFAULT, 150, 50)
    assert [int(row["request"], 16) for row in found["rows"]] == list(range(1, 101))
    last = fabric.query("alice", "requests", limit=20, offset=140)
    assert ([int(row["request"], 16) for row in last["rows"]], last["left_out"]) == (list(range(141, 151)), 0)
    assert fabric.query("alice", "requests", limit=0) == {"rows": [], "total": 150, "left_out": 150}
    assert fabric.query("alice", "requests", model="o", state="queued")["total"] == 75
    bob = fabric.broker.registry.clients[fabric.instances["bob"]].number
    assert fabric.query("alice", "requests", client=str(bob))["total"] == 50
    assert [row["request"] for row in rows(fabric, worker="w")] == ["1"]
    assert fabric.query("alice", "requests", client="nobody")["total"] == 0
    queues = fabric.query("alice", "queue", limit=1)
    assert (queues["rows"][0]["model"], queues["rows"][0]["waiting"], queues["left_out"]) == ("o", 75, 1)
    clients = fabric.query("alice", "clients")
    assert [(row["waiting"], row["running"]) for row in clients["rows"]] == [(99, 1), (50, 0)]


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"sort": "colour"}, RequestError),
        ({"state": "happy"}, RequestError),
        ({"limit": LISTED_MAX + 1}, ParameterRangeError),
        ({"limit": True}, ParameterRangeError),
        ({"offset": -1}, ParameterRangeError),
        ({"model": 7}, ParameterRangeError),
    ],
)
def test_what_a_list_has_not_is_named(fabric: FakeFabric, wanted: Any, error: type[RequestError]) -> None:
    answer = fabric.query("alice", "requests", **wanted)
    assert answer.code == error.code
    assert next(iter(wanted)) in answer.message


def test_every_order_is_an_order(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    for number in range(1, 6):
        fabric.submit("alice", number, deadline_ms=10_000 - number if number % 2 else None)
    for sort in ("age", "place", "deadline", "client", "model", "worker", "units"):
        assert len(rows(fabric, sort=sort)) == 5
    assert [row["request"] for row in rows(fabric, sort="deadline")][:3] == ["5", "3", "1"]
    for sort in ("requests", "age", "silence", "client", "buffered"):
        assert len(rows(fabric, "clients", sort=sort)) == 2
    for sort in ("waiting", "model", "wait"):
        assert len(rows(fabric, "queue", sort=sort)) == 1


def test_others_see_what_is_their_own() -> None:
    bench = Bench()
    bench.worker(slots=2)
    narrow = bench.key_holder(Grant("narrow", frozenset({Role.CLIENT}))).hello(11)
    wide = bench.key_holder(Grant("wide", frozenset({Role.OPERATOR}))).hello(12)
    narrow.submit(1)
    wide.submit(2)
    wide.submit(3)

    def seen(client: Any, what: str) -> list[dict[str, Any]]:
        (answer,) = client.ask(what)
        found: list[dict[str, Any]] = msgspec.msgpack.decode(answer.result)["rows"]
        return found

    assert [row["request"] for row in seen(narrow, "requests")] == ["1"]
    assert [row["key"] for row in seen(narrow, "clients")] == ["narrow"]
    assert sorted(row["request"] for row in seen(wide, "requests")) == ["1", "2", "3"]
    assert sorted(row["key"] for row in seen(wide, "clients")) == ["narrow", "wide"]
    assert seen(narrow, "queue") == seen(wide, "queue")


def test_tokens_so_far_are_what_client_and_worker_tell() -> None:
    """A worker is asked when an operator looks, and only of what the operator sees."""
    bench = Bench()
    worker, other = bench.worker("w"), bench.worker("v", instance=2, models=[], slots=1)
    client = bench.client(11)

    def units() -> int:
        (answer,) = client.ask("requests")
        (row,) = msgspec.msgpack.decode(answer.result)["rows"]
        return int(row["units"])

    client.submit(1, 0, resume_from=3)
    assert units() == 3
    client.send(Credit([CreditLine(request=1, attempt=0, next=10, window=100)]))
    assert units() == 10
    assert worker.take(Beat) == [Beat(0, streams=True)] * 2
    assert other.take(Beat) == []
    lines = [
        StreamUnits(instance=11, request=1, attempt=0, units=42),
        StreamUnits(instance=9, request=9, attempt=0, units=9),
    ]
    worker.send(Load(slots=4, streams=lines))
    assert units() == 42
    assert bench.broker.registry.workers["w"].load.streams == []
