"""The promises that hold for a controller as a whole, as checks of its tables. Each raises `Violation` with the values that
break it. What suits whom, and what is free, is judged here anew, without the code that is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable

from zfabric.core.controller.broker import Broker
from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.peers import Request, WorkerPeer, WorkerState
from zfabric.errors import UnknownModelError, UnsupportedOperationError
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import CIRCUIT_JITTER, CIRCUIT_OPEN_MS_MAX, CIRCUIT_SHARE_MAX
from zfabric.testing.records import Violation
from zfabric.wire import codec, kinds
from zfabric.wire.messages import ModelInfo, Submit


def check_supplies(hosting: Hosting) -> None:
    """A host is a candidate where it suits and has a slot, and nowhere else, where that is kept up to date."""
    for demand, supply in hosting.model.supplies.items():
        able = hosting.open and hosting.suits(demand)
        if supply.kept and (hosting in supply.candidates) != able:
            name = hosting.worker.name
            raise Violation(f"worker {name} is {'not ' if able else ''}a candidate for {demand}, and should be")


def check_bounds(broker: Broker, outsiders: Container[int] = ()) -> None:
    """Promise 7, at any time: slots, queues and what is derived from them.

    Args:
        outsiders: Instances of clients that say what they like, and have lost no attempt so far.
    """
    for worker in broker.registry.workers.values():
        for hosting in worker.hosts.values():
            check_supplies(hosting)
    size = 0
    for model in broker.registry.models.values():
        waiting = model.queue.items()
        size += sum(request.size for request in waiting)
        # Whoever waited before may wait again; a client that only says so is no such one. Where names move, what waited for
        # several of them waits together.
        first = Counter(
            (request.demand, request.asked)
            for request in waiting
            if not request.attempt or request.instance in outsiders
        )
        for (demand, name), count in first.items():
            if count > broker.config.queue_depth_max:
                raise Violation(
                    f"{count} requests for {demand} wait for {name}, limit is {broker.config.queue_depth_max}"
                )
    if size > broker.config.queue_bytes_max:
        raise Violation(f"{size} bytes wait, limit is {broker.config.queue_bytes_max}")
    if size != broker.scheduler.figures.queued_bytes:
        raise Violation(f"{broker.scheduler.figures.queued_bytes} bytes are said to wait, {size} do")


def check_liveness(broker: Broker, workers: Container[str]) -> None:
    """No request waits while a worker that suits it has a free slot, unless an operator has its model paused, or the worker's
    circuit keeps it from more, or it is to unload the model.

    Args:
        workers: Names of the well-behaved ones; others may well be such that no policy takes them.
    """
    for model in broker.registry.models.values():
        if not model.queue or not model.hosts or model.name in broker.registry.directives.paused:
            continue
        free = [host for host in model.hosts.values() if host.worker.name in workers and _has_room(host)]
        for request in model.queue.items():
            for hosting in free:
                if _can_serve(hosting.info, request):
                    raise Violation(
                        f"{request.operation} {request.request:x} waits for {model.name}, "
                        f"and worker {hosting.worker.name} could take it"
                    )


def check_circuits(broker: Broker) -> None:
    """Of the hosts that take requests for a demand no more than a share is out, and none is out without end."""
    latest_ns = broker.timers.now_ns + milliseconds(CIRCUIT_OPEN_MS_MAX * (1 + CIRCUIT_JITTER))
    for model in broker.registry.models.values():
        for demand in model.supplies:
            taking = [host for host in model.hosts.values() if demand in host.demands and host.taking]
            out = [host.circuit for host in taking if host.circuit is not None and host.circuit.out]
            if len(out) > CIRCUIT_SHARE_MAX * len(taking):
                raise Violation(f"{len(out)} of {len(taking)} hosts of {model.name} for {demand} are out")
            for circuit in out:
                if circuit.timer is not None and circuit.timer.due_ns > latest_ns:
                    raise Violation(f"a host of {model.name} is out until {circuit.timer.due_ns} ns")


def _has_room(hosting: Hosting) -> bool:
    worker = hosting.worker
    if worker.state is not WorkerState.READY or hosting.engine in worker.hung or hosting.leaving:
        return False
    circuit = hosting.circuit
    if circuit is not None and circuit.out and (circuit.timer is not None or circuit.probe in worker.live):
        return False
    taken = [request for request in worker.live.values() if _takes_slot(request, worker)]
    if len(taken) >= worker.load.slots - worker.load.elsewhere:
        return False
    return not hosting.info.slots or sum(request.host is hosting for request in taken) < hosting.info.slots


def _takes_slot(request: Request, worker: WorkerPeer) -> bool:
    """Operators' calls and answers that wait for their reader take none, and what hangs in one engine takes no other's."""
    return request.operation != "operate" and request.key not in worker.aside and request.engine not in worker.hung


def _can_serve(info: ModelInfo, request: Request) -> bool:
    if request.operation not in info.capabilities:
        return False
    return not request.resume_from or "resume" in info.capabilities


class Arrival:
    """What was known when a SUBMIT came, against what was made of it."""

    def __init__(self, broker: Broker, header: bytes) -> None:
        self.submit: Submit = codec.unpack_envelope(header)
        name = self.submit.model
        self.serving = [
            hosting.info
            for worker in broker.registry.workers.values()
            for hosting in worker.hosts.values()
            if name == hosting.info.name or name in hosting.info.aliases
        ]

    def check(self, broker: Broker, sender: RoutingId) -> None:
        """A name that is served is not unknown, and what all its models can do is not refused."""
        if not self.serving or self.submit.worker:
            return
        code = _refusal(broker, sender, self.submit)
        if code == UnknownModelError.code:
            raise Violation(f"model {self.submit.model!r} is said to be unknown, and is served")
        if code == UnsupportedOperationError.code:
            models = {info.name for info in self.serving}
            able = {info.name for info in self.serving if self.submit.operation in info.capabilities}
            if models == able:
                raise Violation(f"{self.submit.operation} is refused for {self.submit.model!r}, and {able} can do it")


def _refusal(broker: Broker, sender: RoutingId, submit: Submit) -> int | None:
    """The code by which the controller has just ended this attempt, if it has."""
    for to, header, _ in broker.outbox.pending:
        if to == sender and header[0] == kinds.ENDS:
            for end in codec.unpack_envelope(header).ends:
                if end.request == submit.request and end.attempt == submit.attempt:
                    return int(end.code)
    return None


def check_rest(broker: Broker, workers: Iterable[str] | None = None, clients: Collection[int] = ()) -> None:
    """Promise 7, at rest: every table is empty, every slot is free.

    Args:
        workers: Names of the well-behaved workers; None for all.
        clients: Instances of clients that are still there and say what they like: what is theirs may be left.
    """
    for client in broker.registry.clients.values():
        if client.requests and client.instance not in clients:
            raise Violation(f"the controller keeps {len(client.requests)} requests of client {client.number} at rest")
    strangers = {client.number for client in broker.registry.clients.values() if client.instance in clients}
    for name in list(broker.registry.workers) if workers is None else workers:
        _check_worker_rest(broker.registry.workers[name], clients, strangers)
    if left_over := broker.recovery.searches.instances - set(clients):
        raise Violation(f"claims of {len(left_over)} clients are looked for at rest")
    numbers = {key[-4:] for key in broker.routes.table}
    left = [number for number in numbers if int.from_bytes(number, "big") not in strangers]
    if left:
        raise Violation(f"{len(left)} routes are left at rest")
    waiting = [r for model in broker.registry.models.values() for r in model.queue.items() if r.instance not in clients]
    if waiting:
        raise Violation(f"{len(waiting)} requests wait at rest")
    if not clients and broker.scheduler.figures.queued_bytes:
        raise Violation(f"{broker.scheduler.figures.queued_bytes} bytes wait at rest")


def _check_worker_rest(worker: WorkerPeer, clients: Container[int], strangers: Container[int]) -> None:
    left = [key for key in worker.live if key[0] not in clients]
    if left:
        raise Violation(f"the controller keeps {left} of worker {worker.name} at rest")
    if any(number not in strangers for number in worker.routes):
        raise Violation(f"the controller keeps routes of worker {worker.name} at rest")
    if not worker.live and worker.in_flight:
        raise Violation(f"{worker.in_flight} slots of worker {worker.name} are taken at rest")


def check_announced(broker: Broker, name: str, models: list[ModelInfo]) -> None:
    """The controller knows of a worker what the worker says."""
    worker = broker.registry.workers.get(name)
    known = {} if worker is None else {n: sorted(hosting.info.aliases) for n, hosting in worker.hosts.items()}
    said = {info.name: sorted(info.aliases) for info in models}
    if known != said:
        raise Violation(f"worker {name} serves {said}, and the controller knows {known}")
