"""The question `explain`: how a request came to its worker, and how each host of its model stands for it now."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final

from zfabric.core.controller.decisions import Dispatched
from zfabric.core.controller.dispatch import COSTS
from zfabric.core.controller.hosting import Demand, Hosting
from zfabric.core.controller.listings import all_requests, request_row
from zfabric.core.controller.peers import ClientPeer, Request, WorkerState
from zfabric.core.controller.reasons import Reasons
from zfabric.core.controller.status import name_of, number_of
from zfabric.errors import RequestError
from zfabric.limits import LISTED_DEFAULT, LISTED_MAX
from zfabric.wire.explanations import Choice, Explanation, HostState, HostStatus

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker

_FIRST: Final[tuple[HostState, ...]] = ("open", "full", "circuit")


def explain(broker: Broker, asker: ClientPeer, arguments: dict[str, Any]) -> Explanation:
    """One request: an operator's question is for all, anybody else's for its own.

    Raises:
        RequestError: No such request is here, nor among the last dispatches.
    """
    name = name_of(arguments, "request")
    limit = number_of(arguments, "limit", LISTED_DEFAULT, LISTED_MAX)
    number = _number_of(name)
    scheduler, now_ns = broker.scheduler, broker.timers.now_ns
    request = next((one for one in all_requests(broker, asker) if one.request == number), None)
    choices = scheduler.decisions.of(number, None if asker.grant.sees_all else asker.instance)
    found = Explanation(policy=broker.config.policy, choices=[_choice(one, now_ns) for one in choices])
    if request is not None:
        found.request = request_row(request, None, Reasons(broker.registry, scheduler.queues), now_ns)
        hosts = _hosts(broker, request, now_ns)
        found.hosts = heapq.nsmallest(limit, hosts, _order)
        found.left_out = len(hosts) - len(found.hosts)
    elif not found.choices:
        raise RequestError(f"no request {name!r} is here, nor among the last dispatches", parameter="request")
    return found


def _number_of(name: str) -> int:
    try:
        return int(name, 16)
    except ValueError:
        raise RequestError(
            f"request is {name!r}, it must be a hexadecimal number as lists show it", parameter="request"
        ) from None


def _order(host: HostStatus) -> tuple[int, float, str]:
    """Those that could take it now come first, the cheapest before the others."""
    place = _FIRST.index(host.state) if host.state in _FIRST else len(_FIRST)
    return place, host.cost if host.cost is not None else 0.0, host.worker


def _choice(one: Dispatched, now_ns: int) -> Choice:
    return Choice(
        attempt=one.attempt,
        ago_s=(now_ns - one.at_ns) / 1e9,
        model=one.model,
        worker=one.worker,
        decision=one.decision,
        policy=one.policy,
        candidates=one.candidates,
        loads=dict(one.loads),
        held=one.held,
        blocks=one.blocks,
        block_tokens=one.block_size,
        cached=one.cached,
        cached_most=one.cached_most,
        cached_most_at=one.cached_most_at,
    )


def _hosts(broker: Broker, request: Request, now_ns: int) -> list[HostStatus]:
    model = request.model
    if model is None:
        return []
    supply = broker.registry.supply(model, request.demand)
    ask = broker.scheduler.ask_of(broker.registry.candidates(supply), model, request, now_ns)
    paused = model.name in broker.registry.directives.paused
    cost = COSTS.get(broker.config.policy)
    matched = ask.matched()
    return [
        HostStatus(
            worker=host.name,
            state="paused" if paused else _state(host, request.demand),
            load=host.load,
            speed=host.speed,
            latency_s=host.latency_ns / 1e9 if host.latency_ns else None,
            cached=matched.get(host, 0),
            held=host is ask.held,
            cost=_finite(cost(ask, host)) if cost is not None else None,
            serves_it=host is request.host,
        )
        for host in model.hosts.values()
    ]


def _finite(cost: float) -> float | None:
    return cost if cost < float("inf") else None


def _state(host: Hosting, demand: Demand) -> HostState:
    """In the order in which dispatch is kept from a host."""
    if not host.suits(demand):
        return "unsuited"
    if host.engine in host.worker.hung:
        return "stalled"
    if host.worker.state is WorkerState.DRAINING:
        return "draining"
    if host.circuit is not None and not host.circuit.admits(host):
        return "circuit"
    return "open" if host.free else "full"
