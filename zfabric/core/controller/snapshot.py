"""What a part of a recording begins with: a controller as it is, so that what follows can be read without what came before."""

from __future__ import annotations

from dataclasses import asdict

from zfabric.core.controller.broker import Broker
from zfabric.core.recorder import Recorded


def state_of(broker: Broker, now_ns: int) -> list[Recorded]:
    """Its settings, and the workers that it has."""
    state = [Recorded(now_ns, "config", (asdict(broker.config),))]
    for worker in broker.registry.workers.values():
        values = (
            worker.name,
            sorted(worker.hosts),
            worker.load.slots,
            worker.speed,
            worker.in_flight,
            worker.load.draining,
        )
        state.append(Recorded(now_ns, "worker_there", values))
    return state
