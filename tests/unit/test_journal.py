"""What a controller tells its operator: every peer that comes, goes, hangs or is turned away, and nothing per request."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from tests.peers import FakeFabric, model
from zfabric.cli.log_events import EVENTS
from zfabric.cli.logs import RateLimit, events, make_logger
from zfabric.core.controller import journal
from zfabric.core.controller.journal import Entry
from zfabric.limits import BAD_FRAMES_MAX, CLAIM_MS, JOURNAL_EVENTS_MAX, LOG_LINES_MAX, LOG_WINDOW_MS, STALL_MS

PACKAGE = Path(__file__).resolve().parents[2] / "zfabric"


def told(fabric: FakeFabric) -> list[Entry]:
    return fabric.broker.journal.take()


def names(fabric: FakeFabric) -> list[str]:
    return [entry.event for entry in told(fabric)]


def test_a_worker_comes_changes_drains_and_leaves() -> None:
    fabric = FakeFabric()
    fabric.worker("w", model("a"), slots=3)
    assert told(fabric) == [
        Entry("worker_registered", {"worker": "w", "models": ["a"], "slots": 3, "speed": 1.0, "carried": 0})
    ]
    fabric.worker("w", model("a"), slots=3, again=True)
    assert told(fabric) == []
    fabric.worker("w", model("b"), again=True)
    assert told(fabric) == [Entry("models_announced", {"worker": "w", "gained": ["b"], "dropped": ["a"]})]
    fabric.load("w", draining=True)
    fabric.load("w", draining=True)
    assert told(fabric) == [Entry("worker_draining", {"worker": "w", "by": "worker", "in_flight": 0})]
    fabric.leave("w")
    assert told(fabric) == [Entry("worker_left", {"worker": "w", "in_flight": 0})]
    assert (fabric.broker.sessions.workers_left, fabric.broker.sessions.workers_lost) == (1, 0)


def test_how_a_worker_was_lost_is_said() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    told(fabric)
    fabric.lose("w")
    assert told(fabric) == [
        Entry("worker_lost", {"worker": "w", "why": "connection to worker 'w' was lost", "in_flight": 1})
    ]
    fabric.worker("v", model())
    told(fabric)
    fabric.pass_ms(10_000)
    (lost,) = [entry for entry in told(fabric) if entry.event == "worker_lost"]
    assert "was silent for" in str(lost.fields["why"])
    assert (fabric.broker.sessions.workers_left, fabric.broker.sessions.workers_lost) == (0, 2)


def test_a_client_comes_is_lost_returns_and_leaves() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    told(fabric)
    fabric.lose("alice")
    (lost,) = told(fabric)
    assert (lost.event, lost.fields["in_flight"]) == ("client_lost", 1)
    fabric.client("bob")
    fabric.leave("bob")
    came, left = told(fabric)
    assert (came.event, came.fields["returned"], left.event) == ("client_registered", False, "client_left")
    fabric.pass_ms(CLAIM_MS + 100, "w")
    assert (fabric.broker.sessions.clients_left, fabric.broker.sessions.clients_lost) == (1, 1)


def test_an_engine_hangs_and_moves_again() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    told(fabric)
    fabric.load("w", progress=1)
    fabric.pass_ms(STALL_MS + 1_000, "w")
    fabric.load("w", progress=1)
    (stalled,) = [entry for entry in told(fabric) if entry.event == "engine_stalled"]
    assert (stalled.fields["worker"], stalled.fields["requests"]) == ("w", 1)
    fabric.load("w", progress=2)
    assert "engine_moves" in names(fabric)


def test_who_is_refused_is_told_why() -> None:
    fabric = FakeFabric()
    fabric.worker("w", model())
    fabric.worker("w", model())
    (refused,) = [entry for entry in told(fabric) if entry.event == "peer_refused"]
    assert refused.fields["kind"] == "WORKER_HELLO"
    assert "a live worker is named 'w'" in str(refused.fields["error"])


def test_bad_messages_are_told_by_peer() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    told(fabric)
    for _ in range(BAD_FRAMES_MAX):
        fabric._receive("alice", (b"\x7f", b""))
    entries = told(fabric)
    bad = [entry for entry in entries if entry.event == "bad_message"]
    assert [entry.fields["count"] for entry in bad] == list(range(1, BAD_FRAMES_MAX + 1))
    assert all(str(entry.fields["peer"]).startswith("client ") for entry in bad)
    assert entries[-1].event == "client_left"


def test_a_full_queue_is_told_and_other_requests_are_not() -> None:
    fabric = FakeFabric(queue_depth_max=1)
    fabric.client("alice")
    fabric.worker("w", model())
    told(fabric)
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    assert told(fabric) == []
    fabric.submit("alice", 3)
    (full,) = told(fabric)
    assert (full.event, full.fields["model"]) == ("queue_full", "m")


def test_the_end_of_the_recovery_is_summed_up() -> None:
    fabric = FakeFabric(recovery_ms=3_000)
    fabric.client("alice")
    fabric.pass_ms(4_000)
    (summary,) = [entry for entry in told(fabric) if entry.event == "recovered"]
    assert summary.fields == {"streams": 0, "unclaimed": 0, "workers": 0, "clients": 1}


def test_a_flood_is_counted_and_not_kept() -> None:
    kept = journal.Journal()
    for number in range(JOURNAL_EVENTS_MAX + 7):
        kept.note("queue_full", model=str(number))
    assert kept.dropped == 7
    assert len(kept.take()) == JOURNAL_EVENTS_MAX
    assert kept.dropped == 0


def test_of_one_event_ten_lines_are_written_and_the_rest_is_counted() -> None:
    limit = RateLimit()
    assert [limit.take("worker_lost", 0.0) for _ in range(LOG_LINES_MAX + 3)] == [0] * LOG_LINES_MAX + [None] * 3
    assert limit.take("worker_left", 0.0) == 0
    after_s = LOG_WINDOW_MS / 1_000
    assert limit.take("worker_lost", after_s - 0.1) is None
    assert limit.take("worker_lost", after_s) == 4
    assert limit.take("worker_lost", after_s) == 0


def test_the_log_says_what_it_left_out() -> None:
    now_s = [0.0]
    lines: list[dict[str, object]] = []

    class Recorder:
        def log(self, level: int, event: str, **fields: object) -> None:
            lines.append({"level": level, "event": event, **fields})

    write = events(Recorder(), clock=lambda: now_s[0])  # type: ignore[arg-type]
    for _ in range(LOG_LINES_MAX + 2):
        write("queue_full", model="m")
    now_s[0] = LOG_WINDOW_MS / 1_000
    write("queue_full", model="m")
    assert len(lines) == LOG_LINES_MAX + 1
    assert lines[-1] == {"level": 30, "event": "queue_full", "model": "m", "left_out_before": 2}


def test_an_internal_error_has_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    log = events(make_logger("test", "info", "json"))
    try:
        raise KeyError("nothing there")
    except KeyError as error:
        log("internal_error", exc_info=error)
    assert "Traceback" in capfd.readouterr().err


def test_every_event_in_the_source_has_a_level_and_a_meaning_and_no_other_has() -> None:
    assert set(get_args(journal.Event)) <= EVENTS.keys()
    found = {name for path in PACKAGE.rglob("*.py") for name in _logged(ast.parse(path.read_text()))}
    assert found == EVENTS.keys()


def _logged(tree: ast.Module) -> set[str]:
    """Names of events that a module logs: the first argument of calls to a log."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        name = node.args[0].value
        if (
            called in {"_log", "log", "note", "info", "warning", "error"}
            and isinstance(name, str)
            and name.isidentifier()
        ):
            found.add(name)
    return found
