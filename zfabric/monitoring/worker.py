"""A worker's figures as metrics."""

from __future__ import annotations

import re

from prometheus_client.metrics_core import Metric

from zfabric.monitoring.families import counter, gauge
from zfabric.worker.service import WorkerService

_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")


def metrics_of(service: WorkerService) -> list[Metric]:
    """All that a worker tells of itself. Call it on the loop's thread."""
    load = service.load
    if load is None:
        return []
    engine: dict[tuple[str, ...], float] = {(_NO_NAME.sub("_", name),): value for name, value in load.gauges.items()}
    return [
        gauge("zfabric_worker_slots", "Requests that this worker takes at a time.", load.slots),
        gauge("zfabric_worker_requests_running", "Requests that this worker's engines have.", load.running),
        gauge("zfabric_worker_requests_waiting", "Requests that its engines hold back.", load.waiting),
        gauge("zfabric_worker_draining", "Whether it takes nothing new.", load.draining),
        counter("zfabric_worker_units", "Deltas that its backends made.", service.units),
        gauge("zfabric_worker_tokens_per_second", "Deltas a second over the last beat.", load.tokens_per_second),
        gauge("zfabric_engine", "Figures that engines tell of themselves (docs/backends.md).", engine, "figure"),
    ]
