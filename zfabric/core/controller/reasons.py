"""Why a request is where it is, read from the tables that dispatch itself goes by: supplies, pauses, and claims.

Nothing is remembered for it: what is told is what the next dispatch would find.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from zfabric.core.controller.hosting import Demand, Hosting, Model, Supply
from zfabric.core.controller.peers import Request, WorkerPeer, WorkerState
from zfabric.core.controller.queues import Queues
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.request_state import RequestState
from zfabric.wire.listings import Reason


class Why(NamedTuple):
    """One word for programs, and a sentence for people."""

    reason: Reason
    text: str


NOTHING: Final = Why("", "")
_NOT_WAITING: Final[dict[RequestState, Why]] = {
    RequestState.CLAIMED: Why("claimed", "its client claims it after a lost connection, and its worker is not back with it"),
    RequestState.RECOVERED: Why("unclaimed", "its worker is back with it, and its client has not claimed it"),
    RequestState.CANCELLING: Why("stopping", "its client has cancelled it, and its worker has not confirmed that yet"),
    RequestState.ORPHANED: Why("stopping", "nobody waits for it, and its worker has not confirmed yet that it has stopped"),
    RequestState.FINISHED: Why("client_away", "it has ended, and its worker keeps the answer for its client, which is away"),
}  # fmt: skip


class Reasons:
    """Explains requests. What all requests of one queue share is looked up once: make another one for each question."""

    def __init__(self, registry: Registry, queues: Queues) -> None:
        self._registry = registry
        self._queues = queues
        self._of_queue: dict[tuple[Model, Demand], Why] = {}

    def of(self, request: Request) -> Why:
        """Why a request is not at a worker, or what holds it there."""
        if request.state is RequestState.QUEUED:
            assert request.model is not None
            why = self.of_queue(request.model, request.demand)
            return Why(why.reason, f"{why.text}; its client is away") if request.away else why
        if request.state is RequestState.RUNNING and request.away:
            return Why("client_away", "its client has lost the connection, and may come back for it")
        return _NOT_WAITING.get(request.state, NOTHING)

    def of_queue(self, model: Model, demand: Demand) -> Why:
        """Why what waits for a model with a demand is at no worker."""
        key = (model, demand)
        why = self._of_queue.get(key)
        if why is None:
            why = self._of_queue[key] = self._look(model, demand)
        return why

    def _look(self, model: Model, demand: Demand) -> Why:
        """In the order in which dispatch is kept from it."""
        supply = self._registry.supply(model, demand)
        pause = self._registry.directives.paused.get(model.name)
        if pause is not None:
            return Why("paused", f"model {model.name!r} is paused by operator {pause.by!r}")
        if not supply.hosts:
            return self._nobody_suits(model, demand, supply)
        if not supply.taking:
            states = Counter(_not_taking(host) for host in supply.hosts.values())
            told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            return Why("not_taking", f"no worker that could do it takes requests: {told}")
        if all(host.leaving for host in supply.taking.values()):
            return Why("loading", f"adapter {model.name!r} gives its place to another, and is loaded again in its turn")
        if len(self._registry.candidates(supply)):
            return NOTHING
        return Why("slots", _taken(supply))

    def _nobody_suits(self, model: Model, demand: Demand, supply: Supply) -> Why:
        if self._queues.recovering:
            return Why("recovering", "the controller is new, and workers may still be on their way back to it")
        awaited = self._queues.awaited(model.name)
        if not model.hosts and awaited:
            return Why("loading", awaited)
        wait_ns = self._registry.directives.scaled.get(model.name)
        if not model.hosts and wait_ns is not None:
            limit = f"it waits for {wait_ns / 1e9:g} s at the most"
            return Why("no_worker", f"no worker serves {model.name!r} now, and its rule has one started; {limit}")
        if not model.hosts:
            return Why("no_worker", f"no worker serves {model.name!r} now")
        what = f"go on with {demand.operation} in mid-answer" if demand.resumes else f"do {demand.operation}"
        lost = ", and the one that could was lost and may come back" if supply.expected else ""
        return Why("capability", f"none of {_counted(len(model.hosts), 'worker')} of {model.name!r} can {what}{lost}")


def _not_taking(host: Hosting) -> str:
    if host.engine in host.worker.hung:
        return "stalled"
    return "draining" if host.worker.state is WorkerState.DRAINING else "without slots"


def _taken(supply: Supply) -> str:
    """How the slots of all workers that could do it are in use."""
    hosts = list(supply.taking.values())
    workers = {host.name: host.worker for host in hosts}
    slots = sum(_slots(host) for host in hosts)
    held = Counter(request.state for worker in workers.values() for request in _holding(worker))
    stopping = held[RequestState.CANCELLING] + held[RequestState.ORPHANED]
    told = [f"all {slots} slots of {_counted(len(workers), 'worker')} are taken"]
    if stopping:
        told.append(f"{stopping} by requests that are being stopped")
    out = sum(host.circuit is not None and host.circuit.out for host in hosts)
    if out:
        told[0] = f"slots of {_counted(len(workers), 'worker')} are taken or closed"
        told.append(
            f"{_counted(out, 'worker')} gets no more than a try, since requests failed there one after the other"
        )
    if held[RequestState.RECOVERED]:
        told.append(f"{held[RequestState.RECOVERED]} reserved for clients that have to claim their requests")
    return ", ".join(told)


def _slots(host: Hosting) -> int:
    offered = host.worker.load.slots
    return min(host.slots, offered) if host.slots else offered


def _holding(worker: WorkerPeer) -> list[Request]:
    return [request for key, request in worker.live.items() if key not in worker.aside]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
