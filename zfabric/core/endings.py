"""The way of a request out of the controller: its one terminal, and its place at a worker.

Rule 1: every accepted attempt gets exactly one terminal, here or from its worker.
Rule 2: a slot is taken by an entry in `WorkerPeer.live`, and free when the entry is gone; nothing is counted by hand.
Rule 3: sends are collected, never performed; the caller performs them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zfabric.core.outbox import Outbox, ends_of
from zfabric.core.registry import ClientPeer, Hosting, Registry, Request, WorkerPeer, WorkerState
from zfabric.core.request_state import AT_WORKER, TERMINAL_GIVEN, RequestEvent, RequestState, advance
from zfabric.core.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import DeadlineExceededError, EngineStalledError, FabricError, RequestCancelledError
from zfabric.wire import codec
from zfabric.wire.messages import Abort, Credit, CreditLine, Ends, Grant


@dataclass(slots=True)
class DeskCounters:
    """Totals since the start."""

    submitted: int = 0
    rejected: int = 0
    dispatched: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    queued_bytes: int = 0


class Endings:
    """Ends requests, whoever wants them ended.

    Args:
        unqueue: Takes a request that waits out of its queue.
    """

    def __init__(
        self,
        registry: Registry,
        timers: Timers,
        outbox: Outbox,
        routes: Routes,
        counters: DeskCounters,
        unqueue: Callable[[Request], None],
    ) -> None:
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._routes = routes
        self._leave_queue = unqueue
        self.counters = counters

    # ── a worker's terminals ──────────────────────────────────────────────────────────────────────────────────────────

    def ends(self, worker: WorkerPeer, envelope: Ends, header: bytes, body: bytes, now_ns: int) -> None:
        """A worker ended some requests of one client: pass it on. The slots are free now."""
        # To whoever this worker works for, even if these requests have had their terminal: the body may bring along
        # chunks of other streams. A route is the proof that it does.
        reader = self._registry.clients.get(envelope.instance)
        if reader is not None and reader.number not in worker.routes:
            reader = None
        for end in envelope.ends:
            request = worker.live.get((envelope.instance, end.request, end.attempt))
            if request is None:
                continue
            self._count_end(request, end.code, now_ns)
            request.state = advance(request.state, RequestEvent.ENDED)
            self.retire(request)
        if reader is not None:
            self._outbox.send(reader.routing_id, (header, body))

    def _count_end(self, request: Request, code: int, now_ns: int) -> None:
        worker, host = request.worker, request.host
        assert worker is not None
        if code == 0:
            worker.finished += 1
            self.counters.completed += 1
        elif request.state is RequestState.RUNNING:
            worker.failed += 1
            self.counters.failed += 1
        if host is not None and code == 0 and request.dispatched_ns:
            taken = now_ns - request.dispatched_ns
            host.latency_ns = taken if not host.latency_ns else 0.8 * host.latency_ns + 0.2 * taken

    # ── a place at a worker ───────────────────────────────────────────────────────────────────────────────────────────

    def place(self, request: Request, worker: WorkerPeer, host: Hosting | None) -> None:
        """Enter a request among the live ones of a worker."""
        request.worker, request.host = worker, host
        worker.live[request.key] = request
        if request.slotless:
            worker.slotless += 1
        if host is not None:
            host.in_flight += 1
        if request.client is not None:
            self._routes.add(worker, request.client)
        self._registry.moved(worker, host)

    def retire(self, request: Request) -> None:
        """Take a finished attempt out of every table."""
        self._timers.cancel(request.deadline)
        client, worker = request.client, request.worker
        if client is not None and client.requests.get(request.request) is request:
            del client.requests[request.request]
        if worker is not None:
            del worker.live[request.key]
            if request.slotless:
                worker.slotless -= 1
            if request.host is not None:
                request.host.in_flight -= 1
            if client is not None:
                self._routes.drop(worker, client)
            self._registry.moved(worker, request.host)
        request.worker = request.host = request.client = None

    def adopt(self, request: Request, client: ClientPeer) -> None:
        """Give a recovered request, which a worker runs, its reader."""
        assert request.worker is not None
        request.client, request.owner = client, client.number
        client.requests[request.request] = request
        self._routes.add(request.worker, client)

    # ── the client's side ─────────────────────────────────────────────────────────────────────────────────────────────

    def cancel(self, client: ClientPeer, requests: Iterable[int]) -> None:
        """Stop what a client no longer wants. Unknown requests have ended already."""
        aborts: list[Request] = []
        for number in requests:
            request = client.requests.get(number)
            if request is None:
                continue
            self.counters.cancelled += request.state is not RequestState.CANCELLING
            before, request.state = request.state, advance(request.state, RequestEvent.CANCELLED)
            if before is RequestState.RUNNING:
                aborts.append(request)
            elif before in (RequestState.QUEUED, RequestState.CLAIMED):
                self._end_waiting(request, before, RequestCancelledError("cancelled by the client"))
        self._abort(aborts)

    def credit(self, client: ClientPeer, credit: Credit) -> None:
        """Pass credit on to the workers that run the client's requests."""
        grants: dict[str, tuple[WorkerPeer, list[CreditLine]]] = {}
        for line in credit.lines:
            request = client.requests.get(line.request)
            if request is None or request.attempt != line.attempt:
                continue
            request.window = line.window
            if request.worker is not None:
                plain = CreditLine(request=line.request, attempt=line.attempt, next=line.next, window=line.window)
                grants.setdefault(request.worker.name, (request.worker, []))[1].append(plain)
        for worker, lines in grants.values():
            grant = Grant(client=client.number, instance=client.instance, lines=lines)
            self._outbox.send(worker.routing_id, codec.pack(grant))

    def client_lost(self, client: ClientPeer) -> None:
        """Nobody reads any more: stop all of it."""
        self.abandon(list(client.requests.values()), RequestEvent.CLIENT_LOST)

    def abandon(self, requests: list[Request], event: RequestEvent = RequestEvent.GAVE_UP) -> None:
        """Stop requests without a terminal to their reader."""
        aborts: list[Request] = []
        for request in requests:
            before, request.state = request.state, advance(request.state, event)
            if request.client is not None:
                request.client.requests.pop(request.request, None)
            self._timers.cancel(request.deadline)
            if before in AT_WORKER:
                aborts.append(request)
            else:
                self._unqueue(request, before)
                self.retire(request)
        self._abort(aborts)

    def deadline(self, request: Request) -> None:
        """The time is up: tell the client now, and have the worker stop."""
        self.counters.expired += 1
        before, request.state = request.state, advance(request.state, RequestEvent.DEADLINE)
        error = DeadlineExceededError(f"deadline passed while the request was {before.name.lower()}", state=before.name)
        if before in AT_WORKER:
            client = request.client
            assert client is not None
            del client.requests[request.request]
            self._outbox.end(client, request.request, request.attempt, error)
            if before is RequestState.RUNNING:
                self._abort([request])
        else:
            self._end_waiting(request, before, error)

    def _end_waiting(self, request: Request, before: RequestState, error: FabricError) -> None:
        """Give a request that no worker has its terminal. Its state is DONE already."""
        client = request.client
        assert client is not None
        self._unqueue(request, before)
        self.retire(request)
        self._outbox.end(client, request.request, request.attempt, error)

    def give_up(self, request: Request, error: FabricError) -> None:
        """End a request that waits in vain."""
        before, request.state = request.state, advance(request.state, RequestEvent.GAVE_UP)
        self._end_waiting(request, before, error)

    def _unqueue(self, request: Request, before: RequestState) -> None:
        if before is RequestState.QUEUED:
            self._leave_queue(request)

    def _abort(self, requests: list[Request]) -> None:
        """One ABORT per worker and client."""
        groups: dict[tuple[str, int], tuple[WorkerPeer, list[tuple[int, int]]]] = {}
        for request in requests:
            worker = request.worker
            assert worker is not None
            _, attempts = groups.setdefault((worker.name, request.instance), (worker, []))
            attempts.append((request.request, request.attempt))
        for (_, instance), (worker, attempts) in groups.items():
            self._outbox.send(worker.routing_id, codec.pack(Abort(instance=instance, attempts=attempts)))

    # ── the worker's side ─────────────────────────────────────────────────────────────────────────────────────────────

    def worker_lost(self, worker: WorkerPeer, error: FabricError) -> None:
        """End everything a worker had; its clients send the next attempt."""
        notices: dict[int, tuple[ClientPeer, list[tuple[Request, FabricError]]]] = {}
        for request in list(worker.live.values()):
            before, request.state = request.state, advance(request.state, RequestEvent.WORKER_LOST)
            client = request.client
            if before not in TERMINAL_GIVEN and client is not None:
                cancelled = before is RequestState.CANCELLING
                reason = RequestCancelledError("cancelled by the client") if cancelled else error
                notices.setdefault(client.number, (client, []))[1].append((request, reason))
                self.counters.failed += not cancelled
            self.retire(request)
        for client, lines in notices.values():
            self._outbox.send(client.routing_id, ends_of(client, [(r.request, r.attempt, e) for r, e in lines]))

    def worker_stalled(self, worker: WorkerPeer, silent_ms: int) -> None:
        """The engine hangs: its requests go elsewhere, its slots stay taken until it answers."""
        worker.state = WorkerState.STALLED
        error = EngineStalledError(
            f"engine of worker {worker.name!r} made no progress for {silent_ms} ms",
            worker=worker.name,
            silent_ms=silent_ms,
        )
        running = [request for request in worker.live.values() if request.state not in TERMINAL_GIVEN]
        for request in running:
            if request.client is not None:
                self._outbox.end(request.client, request.request, request.attempt, error)
        self.abandon(running)
        self._registry.refresh(worker)
