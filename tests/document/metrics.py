"""The table of all metrics, from what a daemon that has done nothing serves."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from tests.document.markdown import table
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.worker.figures import WorkerFigures
from zfabric.gateway.figures import Figures
from zfabric.monitoring import controller, gateway, worker
from zfabric.wire.load import Load


def table_of_all() -> str:
    """Every metric of a controller, a worker and a gateway but those of the transport, which has a page of its own."""
    broker = Broker(BrokerConfig(), random.Random(1), 0)
    service: Any = SimpleNamespace(load=Load(), units=0, figures=WorkerFigures(), counted=dict)
    rows = [_row(family, "controller") for family in controller.broker_metrics(broker)]
    rows += [_row(family, "worker") for family in worker.metrics_of(service)]
    rows += [_row(family, "gateway") for family in gateway.metrics_of(Figures())]
    rows.append(("`zfabric_loop_lag_seconds`", "histogram", "all", "How late the event loop is."))
    return table(("metric", "kind", "of", "meaning"), rows)


def _row(family: Any, of: str) -> tuple[str, str, str, str]:
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = "{" + ", ".join(family._labelnames) + "}" if family._labelnames else ""
    return f"`{name}{labels}`", family.type, of, family.documentation
