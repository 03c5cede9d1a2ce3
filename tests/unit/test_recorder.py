"""What a controller and a worker record of their peers and requests, and that they record no more than that."""

from __future__ import annotations

import ast
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tests.peers import FakeFabric, model
from tests.unit.worker_side import WorkerSide, last, token
from zfabric.core.controller import journal
from zfabric.core.controller.snapshot import state_of
from zfabric.core.recorder import FIELDS, MEANINGS, Recorded, Recorder
from zfabric.limits import RECORDED_PENDING_MAX
from zfabric.wire import codec
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams

PACKAGE = Path(__file__).resolve().parents[2] / "zfabric"
SECRET = "a prompt that is nobody's business"


def recorded_fabric(**settings: Any) -> tuple[FakeFabric, Recorder]:
    fabric = FakeFabric(**settings)
    recorder = fabric.broker.journal.recorder = Recorder(lambda: fabric.now_ns)
    return fabric, recorder


def fields_of(entry: Recorded) -> dict[str, object]:
    """Its values by name. All of them have one."""
    values = entry.values
    return values if isinstance(values, dict) else dict(zip(FIELDS[entry.event], values, strict=True))


def names(recorder: Recorder) -> list[str]:
    return [entry.event for entry in recorder.take()]


def test_a_request_is_recorded_from_its_arrival_to_its_end() -> None:
    fabric, recorder = recorded_fabric()
    fabric.client("alice")
    fabric.worker("w", model("m"))
    fabric.submit("alice", 1)
    fabric.end("w", "alice", 1)
    entries = {entry.event: entry for entry in recorder.take()}
    assert list(entries) == ["client_registered", "worker_registered", "submitted", "dispatched", "ended"]
    key = (fabric.instances["alice"], 1, 0)
    assert fields_of(entries["submitted"])["request"] == key
    assert fields_of(entries["dispatched"]) == {"request": key, "worker": "w", "model": "m", "decision": "chosen"}
    assert fields_of(entries["ended"]) == {"request": key, "outcome": "completed", "code": 0, "worker": "w"}


def test_a_loss_and_what_goes_on_elsewhere() -> None:
    fabric, recorder = recorded_fabric()
    fabric.client("alice")
    fabric.worker("w", model("m"))
    fabric.submit("alice", 1)
    recorder.take()
    fabric.lose("w")
    fabric.worker("v", model("m"))
    fabric.submit("alice", 1, attempt=1)
    lost, ended, came, again, sent = recorder.take()
    assert (lost.event, ended.event, fields_of(ended)["outcome"]) == ("worker_lost", "ended", "failed")
    assert (came.event, again.event, sent.event) == ("worker_registered", "submitted", "dispatched")
    assert fields_of(again)["request"] == (fabric.instances["alice"], 1, 1)


def test_what_is_turned_away_and_what_is_given_up() -> None:
    fabric, recorder = recorded_fabric(queue_depth_max=1)
    fabric.client("alice")
    fabric.worker("w", model("m"))
    recorder.take()
    for number in (1, 2, 3):
        fabric.submit("alice", number)
    assert names(recorder) == ["submitted", "dispatched", "submitted", "queue_full", "rejected"]
    fabric.leave("alice")
    assert names(recorder) == ["client_left", "given_up", "given_up"]


def test_a_beat_is_recorded_where_it_tells_something_new() -> None:
    fabric, recorder = recorded_fabric()
    fabric.worker("w", model("m"), slots=2)
    recorder.take()
    fabric.load("w", slots=2)
    fabric.load("w", slots=2)
    assert names(recorder) == []
    fabric.load("w", slots=3)
    (load,) = recorder.take()
    assert (load.event, fields_of(load)["worker"], fields_of(load)["slots"]) == ("load", "w", 3)


def test_a_part_begins_with_what_is_there() -> None:
    fabric, _ = recorded_fabric()
    fabric.worker("w", model("m"), slots=2)
    config, there = state_of(fabric.broker, fabric.now_ns)
    assert (config.event, fields_of(config)["settings"]) == ("config", asdict(fabric.broker.config))
    assert (there.event, fields_of(there)["worker"], fields_of(there)["models"]) == ("worker_there", "w", ["m"])


def test_a_worker_records_begin_first_token_and_end() -> None:
    side = WorkerSide()
    recorder = side.session.observer.recorder = Recorder(lambda: 5)
    name = side.begin(1, body=codec.encode(GenerateRequest(prompt=SECRET, sampling=SamplingParams())))
    side.emit((name, token(1)))
    side.emit((name, token(2)))
    side.emit((name, last(3)))
    entries = recorder.take()
    assert [entry.event for entry in entries] == ["begun", "first_token", "answered"]
    assert (fields_of(entries[-1])["units"], fields_of(entries[-1])["code"]) == (3, 0)
    assert SECRET not in repr(entries)


def test_a_flood_is_counted_and_not_kept() -> None:
    recorder = Recorder(lambda: 1)
    for _ in range(RECORDED_PENDING_MAX + 3):
        recorder.record("load", ())
    *kept, last = recorder.take()
    assert (len(kept), last.event, last.values) == (RECORDED_PENDING_MAX, "left_out", (3,))
    assert recorder.take() == []


def test_every_event_that_is_recorded_has_a_meaning_and_no_other_has() -> None:
    found = {"config", "worker_there", "left_out"}
    for path in (PACKAGE / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "record":
                first = node.args[0]
                found |= {str(first.value)} if isinstance(first, ast.Constant) else set()
    assert found == MEANINGS.keys() == FIELDS.keys()
    assert not MEANINGS.keys() & set(get_args(journal.Event))
