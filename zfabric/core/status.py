"""The registry and the desk, as rows to show. Reads never write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zfabric.core.registry import Model, WorkerPeer
from zfabric.errors import RequestError, UnknownModelError
from zfabric.wire.kinds import PROTOCOL_VERSION
from zfabric.wire.status import FabricStatus, ModelStatus, WorkerStatus

if TYPE_CHECKING:
    from zfabric.core.broker import Broker


def answer(broker: Broker, what: str, arguments: dict[str, Any]) -> Any:
    """The result of a query.

    Raises:
        RequestError: No such query, or a model or kind that does not exist.
    """
    if what == "models":
        return _models(broker, str(arguments.get("kind", "all")))
    if what == "model":
        name = str(arguments.get("name", ""))
        model = broker.registry.find(name)
        if model is None or not model.hosts:
            raise UnknownModelError(f"no worker serves a model named {name!r}", model=name)
        return model_status(model)
    if what == "workers":
        return [worker_status(worker, broker.timers.now_ns) for worker in broker.registry.workers.values()]
    if what == "status":
        return fabric_status(broker)
    raise RequestError(f"there is no query named {what!r}", what=what)


def _models(broker: Broker, kind: str) -> list[ModelStatus]:
    """FastChat's three lists, and embedding models."""
    rows = [model_status(model) for model in broker.registry.models.values() if model.hosts]
    rows.sort(key=lambda row: row.name)
    if kind == "all":
        return rows
    wanted = {
        "language": lambda row: "generate" in row.capabilities and "multimodal" not in row.capabilities,
        "multimodal": lambda row: "multimodal" in row.capabilities,
        "embedding": lambda row: "embed" in row.capabilities,
    }.get(kind)
    if wanted is None:
        raise RequestError(f"kind {kind!r} is not one of all, language, multimodal, embedding", kind=kind)
    return [row for row in rows if wanted(row)]


def model_status(model: Model) -> ModelStatus:
    """One model. What its workers announce differently is given as the first one has it."""
    hosts = list(model.hosts.values())
    info = hosts[0].info
    return ModelStatus(
        name=model.name,
        aliases=sorted({alias for host in hosts for alias in host.info.aliases}),
        workers=sorted(model.hosts),
        slots=sum(min(host.slots or host.worker.load.slots, host.worker.load.slots) for host in hosts),
        in_flight=sum(host.in_flight for host in hosts),
        queued=len(model.queue),
        context_length=min(host.info.context_length for host in hosts),
        capabilities=list(info.capabilities),
        parameters=list(info.parameters),
        dimensions=info.dimensions,
        details=dict(info.details),
    )


def worker_status(worker: WorkerPeer, now_ns: int) -> WorkerStatus:
    """One worker."""
    return WorkerStatus(
        name=worker.name,
        state=worker.state.name.lower(),
        models=sorted(worker.hosts),
        slots=worker.load.slots,
        in_flight=worker.in_flight,
        running=worker.load.running,
        waiting=worker.load.waiting,
        speed=worker.speed,
        tokens_per_second=worker.load.tokens_per_second,
        progress=worker.load.progress,
        kv_blocks_free=worker.load.kv_blocks_free,
        age_s=(now_ns - worker.since_ns) / 1e9,
        silence_ms=(now_ns - worker.heard_ns) / 1e6,
        beats=worker.beats,
        dispatched=worker.dispatched,
        finished=worker.finished,
        failed=worker.failed,
        gauges=worker.load.gauges,
    )


def fabric_status(broker: Broker) -> FabricStatus:
    """The controller in figures."""
    counters = broker.desk.counters
    registry = broker.registry
    return FabricStatus(
        version=broker.build,
        protocol=PROTOCOL_VERSION,
        epoch=broker.epoch,
        uptime_s=(broker.timers.now_ns - broker.started_ns) / 1e9,
        policy=broker.config.policy,
        draining=broker.desk.draining,
        recovering=broker.recovery.active,
        clients=len(broker.registry.clients),
        workers=len(registry.workers),
        models=sum(bool(model.hosts) for model in registry.models.values()),
        in_flight=sum(worker.in_flight for worker in registry.workers.values()),
        queued=sum(len(model.queue) for model in registry.models.values()),
        queued_bytes=counters.queued_bytes,
        submitted=counters.submitted,
        rejected=counters.rejected,
        dispatched=counters.dispatched,
        completed=counters.completed,
        failed=counters.failed,
        cancelled=counters.cancelled,
        expired=counters.expired,
        recovered=broker.recovery.matched,
        workers_lost=broker.workers_lost,
        clients_lost=broker.clients_lost,
        bad_frames=broker.bad_frames,
        transport=broker.transport_figures(),
    )
