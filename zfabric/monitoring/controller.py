"""A controller's figures as metrics.

The loop copies lists of what there is, which takes some microseconds; whoever writes the metrics reads their numbers
afterwards, on a thread of its own. Numbers change meanwhile, each for itself: a metric is right, and two of them may be some
requests apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from zfabric.controller.service import Controller
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.figures import OTHER, Figures, ModelFigures
from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.peers import WorkerPeer, WorkerState
from zfabric.limits import MEASURED_WORKERS_MAX
from zfabric.monitoring.families import counter, errors, gauge, histogram, transport

#: Those figures of a transport that go up and down.
_LEVELS = frozenset(
    {"connections", "handshakes", "buffered_bytes", "buffered_peers", "buffered_peer_bytes_max", "parked"}
)


class _Snapshot:
    """What the loop alone may look through: it changes there."""

    def __init__(self, broker: Broker) -> None:
        registry, figures = broker.registry, broker.scheduler.figures
        #: By label: requests that wait, and hosts.
        self.models: dict[str, list[tuple[int, list[Hosting]]]] = {}
        for model in registry.models.values():
            if model.hosts or len(model.queue):
                found = len(model.queue), list(model.hosts.values())
                self.models.setdefault(figures.label_of(model.name), []).append(found)
        self.measured = list(figures.models.items())
        self.workers = list(registry.workers.values())
        self.clients = list(registry.clients.values())
        self.transport = broker.transport_figures()
        self.bad_messages = dict(broker.bad_messages)
        self.failures = dict(figures.failures)
        self.placed = list(registry.placement.figures.items())
        self.desired: dict[tuple[str, ...], float] = {
            (figures.label_of(name),): count for name, count in broker.scaling.desired.items()
        }
        self.prefix_blocks = len(registry.placement.index)


def metrics_of(controller: Controller) -> Iterator[Metric]:
    """All that a controller tells of itself. Call it on the loop's thread; what it returns may be read on any."""
    return broker_metrics(controller.broker)


def broker_metrics(broker: Broker) -> Iterator[Metric]:
    """All that the controller's core and transport count. Called and read as `metrics_of`."""
    return _written(broker, _Snapshot(broker))


def _written(broker: Broker, snapshot: _Snapshot) -> Iterator[Metric]:
    yield from _requests(snapshot.measured, broker.scheduler.figures, broker)
    yield errors(
        "zfabric_request_errors", "Attempts of requests that ended with an error, by its class.", snapshot.failures
    )
    yield from _placement(snapshot)
    yield from _models(snapshot)
    yield from _peers(broker, snapshot)
    yield from transport(snapshot.transport, _LEVELS)


def _requests(models: list[tuple[str, ModelFigures]], figures: Figures, broker: Broker) -> Iterator[Metric]:
    yield counter(
        "zfabric_requests",
        "Attempts of requests that ended, by model and outcome.",
        {(name, outcome): count for name, it in models for outcome, count in it.outcomes.items()},
        "model",
        "outcome",
    )
    yield histogram(
        "zfabric_request_queue_time_seconds",
        "From the arrival of an attempt to its dispatch to a worker.",
        {(name,): it.queue_time for name, it in models},
        "model",
    )
    yield histogram(
        "zfabric_e2e_request_latency_seconds",
        "From the arrival of an attempt to its end, for those that completed.",
        {(name,): it.whole_time for name, it in models},
        "model",
    )
    yield counter(
        "zfabric_failovers",
        "Attempts beyond a request's first that were dispatched.",
        {(name,): it.failovers for name, it in models},
        "model",
    )
    yield counter(
        "zfabric_resumptions",
        "Dispatched attempts that went on in the middle of an answer.",
        {(name,): it.resumptions for name, it in models},
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
    yield counter(
        "zfabric_circuit_openings",
        "How often a worker got no more requests for a model, since some failed there one after the other.",
        broker.scheduler.circuits.openings,
    )
    yield counter("zfabric_recovered_streams", "Streams that went on after a lost connection.", broker.recovery.matched)
    yield gauge("zfabric_queued_bytes", "Bytes of the requests that wait.", figures.queued_bytes)


def _placement(snapshot: _Snapshot) -> Iterator[Metric]:
    placed = snapshot.placed
    yield counter(
        "zfabric_prefix_dispatches",
        "Dispatches of requests with hashes of their prompts: hit where the worker had the first block cached, else miss.",
        {
            (policy, result): count
            for policy, it in placed
            for result, count in (("hit", it.hits), ("miss", it.dispatches - it.hits))
        },
        "policy",
        "result",
    )
    yield counter(
        "zfabric_prefix_tokens",
        "Tokens of prompts by what the worker they went to had of them: cached, or elsewhere if only another worker had them, or "
        "nowhere.",
        {
            (policy, where): count
            for policy, it in placed
            for where, count in (
                ("cached", it.hit_tokens),
                ("elsewhere", it.regret_tokens),
                ("nowhere", it.tokens - it.hit_tokens - it.regret_tokens),
            )
        },
        "policy",
        "where",
    )
    yield gauge("zfabric_prefix_blocks", "Blocks of prompts whose places are known.", snapshot.prefix_blocks)


def _models(snapshot: _Snapshot) -> Iterator[Metric]:
    models = snapshot.models.items()
    yield gauge(
        "zfabric_requests_waiting",
        "Requests that wait for a free slot.",
        {(name,): sum(waiting for waiting, _ in found) for name, found in models},
        "model",
    )
    yield gauge(
        "zfabric_requests_running",
        "Requests that hold a slot of a worker.",
        {(name,): sum(host.in_flight for _, hosts in found for host in hosts) for name, found in models},
        "model",
    )
    yield gauge(
        "zfabric_model_workers",
        "Workers that serve a model.",
        {(name,): sum(len(hosts) for _, hosts in found) for name, found in models},
        "model",
    )
    yield gauge(
        "zfabric_desired_replicas",
        "Workers that a model should have, by the rule for its replicas.",
        snapshot.desired,
        "model",
    )
    yield gauge(
        "zfabric_circuits_open",
        "Workers that get no requests for a model, or one at a time, since some failed there one after the other.",
        {
            (name,): sum(host.circuit is not None and host.circuit.out for _, hosts in found for host in hosts)
            for name, found in models
        },
        "model",
    )


def _peers(broker: Broker, snapshot: _Snapshot) -> Iterator[Metric]:
    workers, sessions = snapshot.workers, broker.sessions
    states = Counter("stalled" if worker.hung else worker.state.name.lower() for worker in workers)
    known = [*(state.name.lower() for state in WorkerState if state is not WorkerState.GONE), "stalled"]
    yield gauge("zfabric_workers", "Registered workers, by state.", {(it,): states[it] for it in known}, "state")
    yield gauge("zfabric_clients", "Connected clients.", sum(not it.away for it in snapshot.clients))
    yield _by_worker(
        "zfabric_worker_slots",
        "Requests that a worker takes at a time.",
        [(worker, worker.load.slots) for worker in workers],
    )
    yield _by_worker(
        "zfabric_worker_requests_running",
        "Requests that hold a slot of a worker.",
        [(worker, worker.in_flight) for worker in workers],
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
    bad: dict[tuple[str, ...], float] = {(kind,): count for kind, count in snapshot.bad_messages.items()}
    yield counter("zfabric_bad_messages", "Messages that were no use, by kind.", bad, "kind")
    yield counter("zfabric_late_beats", "Workers' beats that came after two intervals.", broker.watch.late_beats)


def _by_worker(name: str, meaning: str, rows: list[tuple[WorkerPeer, int]]) -> Metric:
    """A figure of each worker; of more than have labels of their own, those that came first have them."""
    own: dict[tuple[str, ...], float] = {(worker.name,): value for worker, value in rows[:MEASURED_WORKERS_MAX]}
    more = rows[MEASURED_WORKERS_MAX:]
    if more:
        own[(OTHER,)] = own.get((OTHER,), 0) + sum(value for _, value in more)
    return gauge(name, meaning, own, "worker")
