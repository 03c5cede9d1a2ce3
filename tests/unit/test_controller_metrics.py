"""A controller's metrics: bounded labels, and a loop that is held for no longer than a few lists take."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric

from tests.peers import FakeFabric, model
from zfabric.errors import EngineStalledError, UnknownModelError
from zfabric.limits import MEASURED_MODELS_MAX, MEASURED_WORKERS_MAX
from zfabric.monitoring.controller import broker_metrics


def values(metrics: list[Metric], name: str) -> dict[str, float]:
    found = [sample for metric in metrics for sample in metric.samples if sample.name == name]
    return {"".join(sample.labels.values()): sample.value for sample in found}


def test_the_thousand_and_first_model_is_one_of_the_others() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    for number in range(1_001):
        fabric.worker(f"w{number}", model(f"m{number}"))
    list(broker_metrics(fabric.broker))
    for number in (0, 600, 1_000):
        fabric.submit("alice", number, model=f"m{number}")
    metrics = list(broker_metrics(fabric.broker))
    for name in ("zfabric_requests_running", "zfabric_requests_waiting", "zfabric_model_workers"):
        assert len(values(metrics, name)) == MEASURED_MODELS_MAX + 1
    assert values(metrics, "zfabric_requests_running")["m0"] == 1
    assert values(metrics, "zfabric_requests_running")["other"] == 2
    assert values(metrics, "zfabric_model_workers")["other"] == 1_001 - MEASURED_MODELS_MAX
    assert len(values(metrics, "zfabric_request_queue_time_seconds_count")) == MEASURED_MODELS_MAX + 1
    # A name keeps the line that it has, whatever comes and goes.
    fabric.lose("w1")
    assert "m600" not in values(list(broker_metrics(fabric.broker)), "zfabric_requests_running")


def test_workers_beyond_the_bound_are_one_line() -> None:
    fabric = FakeFabric()
    for number in range(MEASURED_WORKERS_MAX + 10):
        fabric.worker(f"w{number}", model(), slots=3)
    slots = values(list(broker_metrics(fabric.broker)), "zfabric_worker_slots")
    assert len(slots) == MEASURED_WORKERS_MAX + 1
    assert slots["other"] == 30
    assert sum(slots.values()) == 3 * (MEASURED_WORKERS_MAX + 10)


def test_the_loop_copies_lists_and_whoever_writes_reads_them() -> None:
    """What peers come and go meanwhile breaks nothing, and figures are those of the moment in which they are read."""
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model(), slots=2)
    metrics = broker_metrics(fabric.broker)
    fabric.submit("alice", 1)
    fabric.worker("late", model("n"))
    found = list(metrics)
    assert values(found, "zfabric_worker_requests_running") == {"w": 1}
    assert "n" not in values(found, "zfabric_model_workers")


def test_errors_are_counted_by_class() -> None:
    fabric = FakeFabric(stall_ms=1_000, beat_ms=500)
    fabric.client("alice")
    fabric.worker("w", model())
    fabric.submit("alice", 1, model="nobody-serves-this")
    fabric.submit("alice", 2)
    fabric.load("w", progress=1)
    for _ in range(4):
        fabric.pass_ms(500, "w")
        fabric.load("w", progress=1)
    assert fabric.ended("alice") == [(1, UnknownModelError), (2, EngineStalledError)]
    metrics = list(broker_metrics(fabric.broker))
    assert values(metrics, "zfabric_request_errors_total") == {"UnknownModelError": 1, "EngineStalledError": 1}
    outcomes = values(metrics, "zfabric_requests_total")
    assert (outcomes["mfailed"], outcomes["otherrejected"]) == (1, 1)
    # What its worker says of it later is no second end.
    fabric.end("w", "alice", 2)
    assert values(list(broker_metrics(fabric.broker)), "zfabric_requests_total") == outcomes
