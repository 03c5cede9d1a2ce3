"""What a controller counts of its requests."""

from __future__ import annotations

from tests.peers import FakeFabric, model
from zfabric.core.controller.figures import OTHER, Figures
from zfabric.core.histogram import BOUNDS_NS, Histogram
from zfabric.ids import milliseconds
from zfabric.limits import MEASURED_MODELS_MAX


def fabric_of(*, slots: int = 1, **settings: object) -> FakeFabric:
    fabric = FakeFabric(**settings)
    fabric.client("alice")
    fabric.worker("w", model(), slots=slots)
    return fabric


def outcomes(fabric: FakeFabric, name: str = "m") -> dict[str, int]:
    found = fabric.broker.scheduler.figures.models.get(name)
    return {outcome: count for outcome, count in found.outcomes.items() if count} if found is not None else {}


def test_waiting_and_the_whole_are_measured_for_each_model() -> None:
    fabric = fabric_of()
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    fabric.pass_ms(30, "w")
    fabric.end("w", "alice", 1)
    fabric.pass_ms(15, "w")
    fabric.end("w", "alice", 2)
    figures = fabric.broker.scheduler.figures
    measured = figures.models["m"]
    assert outcomes(fabric) == {"completed": 2}
    assert (measured.queue_time.count, measured.queue_time.total_ns) == (2, milliseconds(30))
    assert (measured.whole_time.count, measured.whole_time.total_ns) == (2, milliseconds(30 + 45))
    assert figures.decisions == {"chosen": 1, "queued": 1, "moved": 0, "asked": 0}
    assert figures.dispatched == figures.submitted == 2


def test_each_way_to_end_is_counted_once() -> None:
    fabric = fabric_of(queue_depth_max=1)
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    fabric.submit("alice", 3)
    fabric.cancel("alice", 2)
    fabric.cancel("alice", 2)
    fabric.submit("alice", 4, deadline_ms=10)
    fabric.pass_ms(20, "w")
    fabric.lose("w")
    assert outcomes(fabric) == {"rejected": 1, "cancelled": 1, "expired": 1, "failed": 1}


def test_names_that_nobody_serves_have_no_figures_of_their_own() -> None:
    fabric = fabric_of()
    for number in range(10):
        fabric.submit("alice", number, model=f"unknown-{number}")
    assert set(fabric.broker.scheduler.figures.models) == {OTHER}
    assert outcomes(fabric, OTHER) == {"rejected": 10}


def test_attempts_after_the_first_are_failovers() -> None:
    fabric = fabric_of()
    fabric.worker("v", model())
    fabric.submit("alice", 1)
    fabric.lose(next(name for name in ("w", "v") if fabric.dispatches[name]))
    fabric.submit("alice", 1, attempt=1, resume_from=3)
    measured = fabric.broker.scheduler.figures.models["m"]
    assert (measured.failovers, measured.resumptions) == (1, 1)


def test_models_without_end_share_one_line() -> None:
    figures = Figures()
    for number in range(MEASURED_MODELS_MAX + 50):
        figures.of(f"m{number}").outcomes["completed"] += 1
    assert len(figures.models) == MEASURED_MODELS_MAX + 1
    assert figures.of("another") is figures.models[OTHER]
    assert figures.total("completed") == MEASURED_MODELS_MAX + 50


def test_a_late_report_is_counted() -> None:
    fabric = fabric_of(beat_ms=500)
    fabric.load("w")
    fabric.pass_ms(600, "w")
    fabric.load("w")
    assert fabric.broker.watch.late_beats == 0
    fabric.pass_ms(1_100, "w")
    fabric.load("w")
    assert fabric.broker.watch.late_beats == 1


def test_bad_messages_are_counted_by_kind() -> None:
    fabric = fabric_of()
    for header in (b"\x7f", b"\x7e", b""):
        fabric._receive("alice", (header, b""))
    assert fabric.broker.bad_messages == {"unknown": 3}
    assert fabric.broker.bad_frames == 3


def test_buckets_hold_what_is_at_most_their_bound() -> None:
    taken = Histogram()
    for duration_ns in (-5, 0, BOUNDS_NS[0], BOUNDS_NS[0] + 1, BOUNDS_NS[-1], BOUNDS_NS[-1] + 1):
        taken.observe(duration_ns)
    assert taken.counts[0] == 3
    assert taken.counts[1] == 1
    assert taken.counts[-2:] == [1, 1]
    assert taken.count == 6
    assert (BOUNDS_NS[0], BOUNDS_NS[-1]) == (100_000, 100_000_000_000)
