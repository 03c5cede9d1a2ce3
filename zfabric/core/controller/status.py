"""The registry and the scheduler, as rows to show. Reads never write."""

from __future__ import annotations

import heapq
from itertools import chain
from typing import TYPE_CHECKING, Any

from zfabric.core.controller.hosting import Model
from zfabric.core.controller.peers import ClientPeer, WorkerPeer, WorkerState
from zfabric.core.controller.registry import Registry
from zfabric.errors import ParameterRangeError, RequestError, UnknownModelError
from zfabric.limits import DETAILS_MAX, MESSAGE_LENGTH_MAX, NAME_LENGTH_MAX, SLOW_READERS_MAX
from zfabric.wire.kinds import MINOR_VERSION, PROTOCOL_VERSION
from zfabric.wire.status import FabricStatus, ModelStatus, SlowReader, WorkerStatus

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker


def answer(broker: Broker, what: str, arguments: dict[str, Any]) -> Any:
    """The result of a query.

    Raises:
        RequestError: No such query, or a model or kind that does not exist.
    """
    if what == "models":
        return _models(broker, name_of(arguments, "kind", "all"))
    if what == "model":
        name = name_of(arguments, "name")
        model = broker.registry.find(name)
        if name in broker.registry.directives.scaled and (model is None or not model.hosts):
            return _unstarted(broker, name)
        if model is None or not model.hosts:
            raise UnknownModelError(f"no worker serves a model named {name!r}", model=name)
        return model_status(broker.registry, model)
    if what == "workers":
        return [worker_status(broker, worker) for worker in broker.registry.workers.values()]
    if what == "scaling":
        return broker.scaling.rows()
    if what == "status":
        return fabric_status(broker)
    raise RequestError(f"there is no query named {what!r}", what=what)


def name_of(arguments: dict[str, Any], key: str, default: str = "") -> str:
    """A name among a query's arguments. Raises: ParameterRangeError, it is none."""
    name = arguments.get(key, default)
    if not isinstance(name, str) or len(name) > NAME_LENGTH_MAX:
        raise ParameterRangeError(f"{key} must be text of at most {NAME_LENGTH_MAX} characters", parameter=key)
    return name


def number_of(arguments: dict[str, Any], key: str, default: int, most: int) -> int:
    """A number among a query's arguments. Raises: ParameterRangeError, it is none, or not within 0 … `most`."""
    value = arguments.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ParameterRangeError(f"{key} is {value!r}, it must be an integer 0 … {most}", parameter=key)
    return value


def _models(broker: Broker, kind: str) -> list[ModelStatus]:
    """FastChat's three lists, and embedding models."""
    rows = [model_status(broker.registry, model) for model in broker.registry.models.values() if model.hosts]
    if kind == "all":
        served = {row.name for row in rows}
        rows += [_unstarted(broker, name) for name in broker.registry.directives.scaled if name not in served]
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


def _unstarted(broker: Broker, name: str) -> ModelStatus:
    """A model that is started when it is asked for: nobody is there yet to tell what it can do."""
    model = broker.registry.models.get(name)
    return ModelStatus(name=name, queued=len(model.queue) if model is not None else 0)


def model_status(registry: Registry, model: Model) -> ModelStatus:
    """One model. What its workers announce differently is given as the first one has it; an alias that another model has
    now is not its own."""
    hosts = list(model.hosts.values())
    info = hosts[0].info
    return ModelStatus(
        name=model.name,
        aliases=sorted(alias for alias in model.aliases if registry.find(alias) is model),
        workers=sorted(model.hosts),
        slots=sum(min(host.slots or host.worker.load.slots, host.worker.load.slots) for host in hosts),
        in_flight=sum(host.in_flight for host in hosts),
        queued=len(model.queue),
        context_length=min(host.info.context_length for host in hosts),
        capabilities=list(info.capabilities),
        parameters=None if info.parameters is None else list(info.parameters),
        dimensions=info.dimensions,
        defaults=dict(info.defaults),
        extra=None if info.extra is None else list(info.extra),
        details={
            name[:NAME_LENGTH_MAX]: value[:MESSAGE_LENGTH_MAX] if isinstance(value, str) else value
            for name, value in list(info.details.items())[:DETAILS_MAX]
        },
        paused_by=pause.by if (pause := registry.directives.paused.get(model.name)) is not None else "",
    )


def worker_status(broker: Broker, worker: WorkerPeer) -> WorkerStatus:
    """One worker. It is called stalled if one of its engines hangs."""
    now_ns = broker.timers.now_ns
    stalled = worker.hung and worker.state is WorkerState.READY
    return WorkerStatus(
        name=worker.name,
        state="stalled" if stalled else worker.state.name.lower(),
        models=sorted(worker.hosts),
        slots=worker.load.slots,
        in_flight=worker.in_flight,
        elsewhere=worker.load.elsewhere,
        running=worker.load.running,
        waiting=worker.load.waiting,
        speed=worker.speed,
        tokens_per_second=worker.load.tokens_per_second,
        progress=worker.load.progress,
        kv_blocks_free=worker.load.kv_blocks_free,
        age_s=(now_ns - worker.since_ns) / 1e9,
        # Chunks are relayed outside of the core's turns: a worker may have been heard since the last one.
        silence_ms=max(0, now_ns - worker.heard_ns) / 1e6,
        beats=worker.beats,
        dispatched=worker.dispatched,
        finished=worker.finished,
        failed=worker.failed,
        buffered_bytes=broker.buffered_of(worker.routing_id),
        gauges=worker.load.gauges,
        build=worker.build,
        minor=worker.minor,
        drained_by=worker.leaves_for or broker.registry.directives.held.get(worker.name, ""),
        circuits={
            name: host.circuit.state
            for name, host in sorted(worker.hosts.items())
            if host.circuit is not None and host.circuit.out
        },
    )


def fabric_status(broker: Broker) -> FabricStatus:
    """The controller in figures."""
    figures = broker.scheduler.figures
    registry = broker.registry
    return FabricStatus(
        version=broker.build,
        protocol=PROTOCOL_VERSION,
        epoch=broker.epoch,
        uptime_s=(broker.timers.now_ns - broker.started_ns) / 1e9,
        policy=broker.config.policy,
        draining=broker.scheduler.draining,
        recovering=broker.recovery.active,
        clients=sum(not client.away for client in registry.clients.values()),
        workers=len(registry.workers),
        models=sum(bool(model.hosts) for model in registry.models.values()),
        in_flight=sum(worker.in_flight for worker in registry.workers.values()),
        queued=sum(len(model.queue) for model in registry.models.values()),
        queued_bytes=figures.queued_bytes,
        submitted=figures.submitted,
        rejected=figures.total("rejected"),
        dispatched=figures.dispatched,
        completed=figures.total("completed"),
        failed=figures.total("failed"),
        cancelled=figures.total("cancelled"),
        expired=figures.total("expired"),
        recovered=broker.recovery.matched,
        workers_lost=broker.sessions.workers_lost,
        clients_lost=broker.sessions.clients_lost,
        workers_left=broker.sessions.workers_left,
        clients_left=broker.sessions.clients_left,
        bad_frames=broker.bad_frames,
        policy_failures=broker.scheduler.chooser.failures,
        transport=broker.transport_figures(),
        slow_readers=_slow_readers(broker),
        minor=MINOR_VERSION,
        unix_s=broker.wall_clock_s(),
    )


def _slow_readers(broker: Broker) -> list[SlowReader]:
    """Sessions for which most waits, the largest first."""
    peers: chain[ClientPeer | WorkerPeer] = chain(broker.registry.clients.values(), broker.registry.workers.values())
    waiting = ((broker.buffered_of(peer.routing_id), peer.shown) for peer in peers)
    rows = heapq.nlargest(SLOW_READERS_MAX, (row for row in waiting if row[0]))
    return [SlowReader(name=name, buffered_bytes=size) for size, name in rows]
