"""A controller's figures as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from zfabric.controller.service import Controller
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.figures import Figures
from zfabric.core.controller.peers import WorkerState
from zfabric.core.controller.registry import Registry
from zfabric.monitoring.families import counter, gauge, histogram

#: Those figures of a transport that go up and down.
_LEVELS = frozenset(
    {"connections", "handshakes", "buffered_bytes", "buffered_peers", "buffered_peer_bytes_max", "parked"}
)


def metrics_of(controller: Controller) -> list[Metric]:
    """All that a controller tells of itself. Call it on the loop's thread: what it reads changes there."""
    return broker_metrics(controller.broker)


def broker_metrics(broker: Broker) -> list[Metric]:
    """All that the controller's core and transport count."""
    return [
        *_requests(broker.scheduler.figures, broker),
        *_models(broker.registry),
        *_peers(broker),
        *_transport(broker.transport_figures()),
    ]


def _requests(figures: Figures, broker: Broker) -> Iterator[Metric]:
    models = figures.models
    yield counter(
        "zfabric_requests",
        "Attempts of requests that ended, by model and outcome.",
        {(name, outcome): count for name, it in models.items() for outcome, count in it.outcomes.items()},
        "model",
        "outcome",
    )
    yield histogram(
        "zfabric_request_queue_time_seconds",
        "From the arrival of an attempt to its dispatch to a worker.",
        {(name,): it.queue_time for name, it in models.items()},
        "model",
    )
    yield histogram(
        "zfabric_e2e_request_latency_seconds",
        "From the arrival of an attempt to its end, for those that completed.",
        {(name,): it.whole_time for name, it in models.items()},
        "model",
    )
    yield counter(
        "zfabric_failovers",
        "Attempts beyond a request's first that were dispatched.",
        {(name,): it.failovers for name, it in models.items()},
        "model",
    )
    yield counter(
        "zfabric_resumptions",
        "Dispatched attempts that went on in the middle of an answer.",
        {(name,): it.resumptions for name, it in models.items()},
        "model",
    )
    yield counter(
        "zfabric_dispatches",
        "Dispatches, by policy and by how they came about: chosen at once, queued before, moved to another model, or asked "
        "for by the worker's name.",
        {(policy, decision): count for (policy, decision), count in figures.by_policy(broker.config.policy).items()},
        "policy",
        "reason",
    )
    yield counter(
        "zfabric_policy_failures", "Calls of an operator's policy that failed.", broker.scheduler.chooser.failures
    )
    yield counter("zfabric_recovered_streams", "Streams that went on after a lost connection.", broker.recovery.matched)
    yield gauge("zfabric_queued_bytes", "Bytes of the requests that wait.", figures.queued_bytes)


def _models(registry: Registry) -> Iterator[Metric]:
    served = {name: model for name, model in registry.models.items() if model.hosts or len(model.queue)}
    yield gauge(
        "zfabric_requests_waiting",
        "Requests that wait for a free slot.",
        {(name,): len(model.queue) for name, model in served.items()},
        "model",
    )
    yield gauge(
        "zfabric_requests_running",
        "Requests that hold a slot of a worker.",
        {(name,): sum(host.in_flight for host in model.hosts.values()) for name, model in served.items()},
        "model",
    )
    yield gauge(
        "zfabric_model_workers",
        "Workers that serve a model.",
        {(name,): len(model.hosts) for name, model in served.items()},
        "model",
    )


def _peers(broker: Broker) -> Iterator[Metric]:
    registry, sessions = broker.registry, broker.sessions
    states = Counter(worker.state.name.lower() for worker in registry.workers.values() if not worker.hung)
    states["stalled"] = sum(bool(worker.hung) for worker in registry.workers.values())
    known = [*(state.name.lower() for state in WorkerState if state is not WorkerState.GONE), "stalled"]
    yield gauge("zfabric_workers", "Registered workers, by state.", {(it,): states[it] for it in known}, "state")
    yield gauge("zfabric_clients", "Connected clients.", sum(not it.away for it in registry.clients.values()))
    yield gauge(
        "zfabric_worker_slots",
        "Requests that a worker takes at a time.",
        {(name,): worker.load.slots for name, worker in registry.workers.items()},
        "worker",
    )
    yield gauge(
        "zfabric_worker_requests_running",
        "Requests that hold a slot of a worker.",
        {(name,): worker.in_flight for name, worker in registry.workers.items()},
        "worker",
    )
    yield counter(
        "zfabric_peers_lost",
        "Sessions that ended without a goodbye.",
        {("worker",): sessions.workers_lost, ("client",): sessions.clients_lost},
        "role",
    )
    yield counter(
        "zfabric_peers_left",
        "Sessions that ended with a goodbye.",
        {("worker",): sessions.workers_left, ("client",): sessions.clients_left},
        "role",
    )
    bad: dict[tuple[str, ...], float] = {(kind,): count for kind, count in broker.bad_messages.items()}
    yield counter("zfabric_bad_messages", "Messages that were no use, by kind.", bad, "kind")
    yield counter("zfabric_late_beats", "Workers' beats that came after two intervals.", broker.watch.late_beats)


def _transport(figures: dict[str, int]) -> Iterator[Metric]:
    for name, value in figures.items():
        meaning = f"Figure {name!r} of the transport (docs/transport.md)."
        make = gauge if name in _LEVELS else counter
        yield make(f"zfabric_transport_{name}", meaning, value)
