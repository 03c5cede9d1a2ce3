"""Lists of requests, clients and queues: filtered, sorted, cut to what was asked for, and explained.

An operator sees all of it. Any other client sees its own requests and itself, and of queues what they are in all, as it sees
it in the list of models. Only rows that are shown are made; to find them costs a look at each request, and the place in its
queue O(n log n) for all that wait there.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar

from zfabric.core.controller.hosting import Demand, Model
from zfabric.core.controller.peers import ClientPeer, Request
from zfabric.core.controller.queues import Queues
from zfabric.core.controller.reasons import Reasons
from zfabric.core.controller.request_state import RequestState
from zfabric.core.controller.status import name_of, number_of
from zfabric.errors import RequestError
from zfabric.limits import LISTED_DEFAULT, LISTED_MAX
from zfabric.wire import codec
from zfabric.wire.listings import ClientList, ClientStatus, QueueList, QueueStatus, RequestList, RequestStatus
from zfabric.wire.messages import Beat

if TYPE_CHECKING:
    from zfabric.core.controller.broker import Broker

Arguments = dict[str, Any]
T = TypeVar("T")
#: Later than any time.
_NEVER: Final = 2**63
_CLIENT_STATES: Final = ("connected", "away")


class _Wanted:
    """What a question asks of a list: which rows, in which order, and how many.

    Args:
        sorts: The orders that the list knows, by name; the first is the default.
        states: The states that its rows can have.
    """

    def __init__(self, arguments: Arguments, sorts: Iterable[str], states: Iterable[str]) -> None:
        self.model = name_of(arguments, "model")
        self.client = name_of(arguments, "client")
        self.worker = name_of(arguments, "worker")
        self.state = _one_of(arguments, "state", ["", *states])
        self.sort = _one_of(arguments, "sort", list(sorts))
        self.limit = number_of(arguments, "limit", LISTED_DEFAULT, LISTED_MAX)
        self.offset = number_of(arguments, "offset", 0, 2**31)

    def cut(self, found: list[T], key: Callable[[T], Any]) -> tuple[list[T], int]:
        """The rows that are shown, and how many come after them."""
        end = self.offset + self.limit
        rows = heapq.nsmallest(end, found, key)[self.offset :]
        return rows, max(0, len(found) - end)

    def has_client(self, client: ClientPeer | None) -> bool:
        """Whether a client is one that was asked for, by its label or number."""
        if not self.client:
            return True
        return client is not None and self.client in (client.label, str(client.number))


def _one_of(arguments: Arguments, key: str, known: list[str]) -> str:
    given = name_of(arguments, key, known[0])
    if given not in known:
        raise RequestError(f"{key} {given!r} is not one of {', '.join(filter(None, known))}", parameter=key)
    return given


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────

_REQUEST_SORTS: Final[dict[str, Callable[[Request], Any]]] = {
    "age": lambda request: (request.accepted_ns, request.arrival),
    "place": lambda request: 0,
    "deadline": lambda request: request.deadline_ns if request.deadline_ns is not None else _NEVER,
    "client": lambda request: _name_of_client(request),
    "model": lambda request: request.model.name if request.model is not None else "",
    "worker": lambda request: request.worker.name if request.worker is not None else "",
    "units": lambda request: -request.units,
}


def requests(broker: Broker, asker: ClientPeer, arguments: Arguments) -> RequestList:
    """Attempts, the oldest first unless another order is asked for.

    Raises:
        RequestError: A filter or an order that there is none of.
    """
    wanted = _Wanted(arguments, _REQUEST_SORTS, [state.name.lower() for state in RequestState])
    model = broker.registry.find(wanted.model) if wanted.model else None
    found = [
        request
        for request in all_requests(broker, asker)
        if (not wanted.state or request.state.name.lower() == wanted.state)
        and (
            not wanted.model
            or (request.model is not None and (request.model is model or wanted.model == request.asked))
        )
        and (not wanted.worker or (request.worker is not None and request.worker.name == wanted.worker))
        and wanted.has_client(request.client)
    ]
    places: dict[Request, int] = {}
    key = _REQUEST_SORTS[wanted.sort]
    if wanted.sort == "place":
        _find_places(found, places)
        key = lambda request: (places.get(request, _NEVER), request.arrival)  # noqa: E731
    shown, left_out = wanted.cut(found, key)
    _find_places(shown, places)
    reasons = Reasons(broker.registry, broker.scheduler.queues)
    rows = [request_row(request, places.get(request), reasons, broker.timers.now_ns) for request in shown]
    if asker.grant.sees_all:
        _have_units_told(broker, shown)
    return RequestList(rows=rows, total=len(found), left_out=left_out)


def all_requests(broker: Broker, asker: ClientPeer) -> Iterator[Request]:
    """Those that the asker may see."""
    if not asker.grant.sees_all:
        yield from asker.requests.values()
        return
    yield from chain.from_iterable(client.requests.values() for client in broker.registry.clients.values())
    yield from (request for request in broker.registry.live.values() if request.client is None)


def _find_places(of: Iterable[Request], places: dict[Request, int]) -> None:
    """Where those of the requests that wait stand in their queues."""
    for request in of:
        if request.state is RequestState.QUEUED and request not in places:
            assert request.model is not None
            places |= {it: place for place, it in enumerate(request.model.queue.in_order(request.demand), start=1)}


def _name_of_client(request: Request) -> str:
    return request.client.name if request.client is not None else ""


def request_row(request: Request, place: int | None, reasons: Reasons, now_ns: int) -> RequestStatus:
    """One attempt, at its place in its queue."""
    client, model, worker = request.client, request.model, request.worker
    accepted_ns, dispatched_ns, deadline_ns = request.accepted_ns, request.dispatched_ns, request.deadline_ns
    why = reasons.of(request)
    return RequestStatus(
        request=f"{request.request:x}",
        attempt=request.attempt,
        client=_name_of_client(request),
        client_number=client.number if client is not None else 0,
        operation=request.operation,
        model=model.name if model is not None else "",
        asked=request.asked,
        state=request.state.name.lower(),
        priority=request.priority,
        place=place,
        worker=worker.name if worker is not None else "",
        age_s=(now_ns - accepted_ns) / 1e9 if accepted_ns else None,
        waited_s=((dispatched_ns or now_ns) - accepted_ns) / 1e9 if accepted_ns else None,
        running_s=(now_ns - dispatched_ns) / 1e9 if dispatched_ns else None,
        deadline_s=(deadline_ns - now_ns) / 1e9 if deadline_ns is not None else None,
        units=request.units,
        size=len(request.body) if request.body is not None else 0,
        reason=why.reason,
        why=why.text,
    )


def _have_units_told(broker: Broker, shown: list[Request]) -> None:
    """Ask the workers of these for how far they are; the next list has it."""
    for worker in {request.worker.name: request.worker for request in shown if request.worker is not None}.values():
        broker.outbox.send(worker.routing_id, codec.pack(Beat(0, streams=True)))


# ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def clients(broker: Broker, asker: ClientPeer, arguments: Arguments) -> ClientList:
    """Clients, those with most requests first unless another order is asked for. Raises: RequestError."""
    now_ns = broker.timers.now_ns
    sorts: dict[str, Callable[[ClientPeer], Any]] = {
        "requests": lambda client: (-len(client.requests), client.name),
        "age": lambda client: client.since_ns,
        "silence": lambda client: client.heard_ns,
        "client": lambda client: client.name,
        "buffered": lambda client: -broker.buffered_of(client.routing_id),
    }
    wanted = _Wanted(arguments, sorts, _CLIENT_STATES)
    known = broker.registry.clients.values() if asker.grant.sees_all else [asker]
    found = [
        client
        for client in known
        if wanted.has_client(client) and (not wanted.state or (wanted.state == "away") is client.away)
    ]
    shown, left_out = wanted.cut(found, sorts[wanted.sort])
    rows = [_client_row(client, broker.buffered_of(client.routing_id), now_ns) for client in shown]
    return ClientList(rows=rows, total=len(found), left_out=left_out)


def _client_row(client: ClientPeer, buffered: int, now_ns: int) -> ClientStatus:
    waiting = [request for request in client.requests.values() if request.state is RequestState.QUEUED]
    return ClientStatus(
        client=client.name,
        number=client.number,
        state="away" if client.away else "connected",
        key=client.grant.name,
        waiting=len(waiting),
        running=sum(request.worker is not None for request in client.requests.values()),
        longest_wait_s=_longest(waiting, now_ns),
        age_s=(now_ns - client.since_ns) / 1e9,
        silence_s=(now_ns - client.heard_ns) / 1e9,
        buffered_bytes=buffered,
        build=client.build,
        minor=client.minor,
    )


def _longest(waiting: list[Request], now_ns: int) -> float:
    return max([(now_ns - request.accepted_ns) / 1e9 for request in waiting], default=0.0)


# ── queues ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def queue(broker: Broker, _asker: ClientPeer | None, arguments: Arguments) -> QueueList:
    """What waits, a row for each model and what is demanded of its workers, the most first unless another order is asked for.
    Whoever asks is told the same.

    Raises:
        RequestError: An order that there is none of.
    """
    registry, now_ns = broker.registry, broker.timers.now_ns
    reasons = Reasons(registry, broker.scheduler.queues)
    sorts: dict[str, Callable[[QueueStatus], Any]] = {
        "waiting": lambda row: (-row.waiting, row.model),
        "model": lambda row: (row.model, row.operation),
        "wait": lambda row: -row.longest_wait_s,
    }
    wanted = _Wanted(arguments, sorts, ())
    asked = registry.find(wanted.model) if wanted.model else None
    rows = [
        _queue_row(broker.scheduler.queues, model, demand, reasons, now_ns)
        for model in registry.models.values()
        if not wanted.model or model is asked
        for demand in model.queue.demands
        if isinstance(demand, Demand)
    ]
    shown, left_out = wanted.cut(rows, sorts[wanted.sort])
    return QueueList(rows=shown, total=len(rows), left_out=left_out)


def _queue_row(queues: Queues, model: Model, demand: Demand, reasons: Reasons, now_ns: int) -> QueueStatus:
    waiting = model.queue.waiting(demand)
    supply = model.supplies[demand]
    due_ns = queues.ends_ns(model, demand)
    why = reasons.of_queue(model, demand)
    return QueueStatus(
        model=model.name,
        operation=demand.operation,
        resumes=demand.resumes,
        waiting=len(waiting),
        size=sum(request.size for request in waiting),
        clients=len({request.owner for request in waiting}),
        longest_wait_s=_longest(waiting, now_ns),
        workers=len(supply.hosts),
        taking=len(supply.taking),
        free=sum(host.open for host in supply.taking.values()),
        ends_s=max(0.0, (due_ns - now_ns) / 1e9) if due_ns is not None else None,
        reason=why.reason,
        why=why.text,
    )
