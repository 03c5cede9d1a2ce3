"""The way of a request out of the controller: its one terminal, and its place at a worker.

Rule 1: every accepted attempt gets exactly one terminal, here or from its worker, unless its client claims it again.
Rule 2: a slot is taken by an entry in `WorkerPeer.live`, and free when the entry is gone or `aside`; nothing is counted.
Rule 3: sends are collected, never performed; the caller performs them in order.
Rule 4: what ends while its client is away is kept: by its worker, which has the answer, and here as FINISHED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from zfabric.core.controller.batches import ATTEMPT_BYTES, LINE_BYTES, batches
from zfabric.core.controller.circuits import Circuits
from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.observer import Observer
from zfabric.core.controller.outbox import Notice, Outbox
from zfabric.core.controller.peers import ClientPeer, Engine, Request, WorkerPeer
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.request_state import AT_WORKER, TERMINAL_GIVEN, RequestEvent, RequestState, advance
from zfabric.core.controller.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import FAILOVER_CODES, DeadlineExceededError, EngineStalledError, FabricError, RequestCancelledError
from zfabric.limits import ATTEMPTS_MAX
from zfabric.wire import codec
from zfabric.wire.flow import Abort, Credit, CreditLine, Grant
from zfabric.wire.messages import End, Ends

#: The state of what a returning client may find as it left it.
_LIVING: Final = frozenset({RequestState.QUEUED, RequestState.RUNNING, RequestState.FINISHED})
#: The states of what a lost worker may bring back.
_CARRIED: Final = frozenset({RequestState.RUNNING, RequestState.FINISHED})
#: The states of what was counted when it came to them, whatever its worker still says of it.
_COUNTED: Final = frozenset({RequestState.CANCELLING, RequestState.ORPHANED, RequestState.FINISHED})
#: Stands for a terminal that its worker had no right to give: no client waits for it.
_NOBODY: Final = End(request=2**63 - 1, attempt=ATTEMPTS_MAX)


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
        observer: Observer,
        unqueue: Callable[[Request], None],
        circuits: Circuits,
    ) -> None:
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._routes = routes
        self._leave_queue = unqueue
        #: Says why a request has not ended, in words; "" where there is nothing to say.
        self.explain: Callable[[Request], str] = lambda _: ""
        self._observer = observer
        self._circuits = circuits

    # ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def place(self, request: Request, worker: WorkerPeer, host: Hosting | None, *, finished: bool = False) -> None:
        """Enter a request among the live ones of a worker. What has `finished` there needs no slot."""
        key = request.key
        former = worker.live.get(key)
        if former is not None:
            # One that two workers brought back, submitted anew. One entry, one slot: nobody misses the former.
            self.retire(former)
        request.worker, request.host = worker, host
        worker.live[key] = self._registry.live[key] = request
        if finished or request.operation == "operate":
            worker.aside.add(key)
        elif host is not None:
            engine = request.engine = host.engine
            if not engine.live:
                # Before, it had nothing to do.
                engine.moved_ns = self._timers.now_ns
            self._circuits.sent(request, host)
            host.live.add(key)
            engine.live.add(key)
        if request.client is not None and not request.away:
            self._routes.add(worker, request.client)
        self._registry.moved(worker, host)

    def _set_aside(self, request: Request) -> None:
        """It holds no slot any more, and stays."""
        worker = request.worker
        assert worker is not None
        worker.aside.add(request.key)
        self._leave_engine(request)
        self._registry.moved(worker, request.host)

    def _leave_engine(self, request: Request) -> None:
        if request.host is not None:
            request.host.live.discard(request.key)
        if request.engine is not None:
            request.engine.live.discard(request.key)

    def _vacate(self, request: Request) -> None:
        worker, host = request.worker, request.host
        assert worker is not None
        del worker.live[request.key]
        if self._registry.live.get(request.key) is request:
            del self._registry.live[request.key]
        worker.aside.discard(request.key)
        self._leave_engine(request)
        request.worker = request.host = request.engine = None
        self._registry.moved(worker, host)

    def read(self, request: Request, client: ClientPeer, *, away: bool = False) -> None:
        """Somebody waits for the request from now on."""
        self._unread(request)
        request.client, request.away = client, away
        client.requests[request.request] = request
        if request.worker is not None and not away:
            self._routes.add(request.worker, client)

    def _unread(self, request: Request) -> None:
        """Nobody waits for it any more."""
        client, request.client = request.client, None
        if client is None:
            return
        if client.requests.get(request.request) is request:
            del client.requests[request.request]
        if request.worker is not None and not request.away:
            self._routes.drop(request.worker, client)

    def retire(self, request: Request) -> None:
        """Take a finished attempt out of every table."""
        self._timers.cancel(request.deadline)
        self._unread(request)
        if request.worker is not None:
            self._vacate(request)
        if request.account is not None:
            request.account.leave(request, self._timers.now_ns)
        self._observer.retired(request, self._timers.now_ns)

    def expect(self, request: Request, deadline_ns: int | None) -> None:
        """Set when the request has to have ended."""
        if deadline_ns is not None:
            request.deadline_ns = deadline_ns
            request.deadline = self._timers.at(deadline_ns, lambda _: self.deadline(request))

    # ── a worker's terminals ────────────────────────────────────────────────────────────────────────────────────────

    def ends(self, worker: WorkerPeer, envelope: Ends, header: bytes, body: bytes, now_ns: int) -> None:
        """A worker ended some requests of one client: pass it on. The slots are free now."""
        # To whoever reads this worker, even if these requests have had their terminal: the body may bring along chunks of
        # other streams. A route is the proof that it does.
        reader = self._registry.clients.get(envelope.instance)
        if reader is not None and (reader.number not in worker.routes or envelope.client not in (0, reader.number)):
            reader = None
        foreign = False
        for position, end in enumerate(envelope.ends):
            request = worker.live.get((envelope.instance, end.request, end.attempt))
            if request is None:
                # Late, or not its own: it may not end what runs elsewhere. The body has an outcome for each, in order.
                envelope.ends[position] = _NOBODY
                foreign = True
            else:
                request.units = max(request.units, end.units)
                self._ended(request, end.code, envelope.client, now_ns)
        if reader is not None:
            self._outbox.send(reader.routing_id, (codec.pack_envelope(envelope) if foreign else header, body))

    def _ended(self, request: Request, code: int, client: int, now_ns: int) -> None:
        """One of them. If it missed its reader, who may come and claim it, its worker keeps it."""
        reader, first = request.client, request.state is not RequestState.FINISHED
        if first:
            self._count_end(request, code, now_ns)
        missed = reader is not None and (request.away or client not in (0, reader.number))
        if missed and request.state in _LIVING:
            request.state = advance(request.state, RequestEvent.UNREAD)
            self._set_aside(request)
        else:
            if code in FAILOVER_CODES:
                self._remember(request)
            request.state = advance(request.state, RequestEvent.ENDED)
            self.retire(request)

    def _count_end(self, request: Request, code: int, now_ns: int) -> None:
        worker, host = request.worker, request.host
        assert worker is not None
        if code == 0:
            worker.finished += 1
            if request.state not in _COUNTED:
                self._observer.ended(request, "completed", 0, now_ns)
        elif request.state is RequestState.RUNNING:
            worker.failed += 1
            self._observer.ended(request, "failed", code, now_ns)
        if host is not None:
            self._circuits.ended(request, host, code)
            if code == 0 and request.dispatched_ns:
                host.measured(now_ns - request.dispatched_ns)

    # ── the client's side ───────────────────────────────────────────────────────────────────────────────────────────

    def cancel(self, client: ClientPeer, requests: Iterable[int]) -> None:
        """Stop what a client no longer wants. Unknown requests have ended already."""
        aborts: list[Request] = []
        for number in requests:
            request = client.requests.get(number)
            if request is None:
                continue
            if request.away:
                self.read(request, client)
            if request.state not in _COUNTED:
                self._observer.ended(request, "cancelled", RequestCancelledError.code, self._timers.now_ns)
            self._observer.befell(request, "zfabric.cancelled", self._timers.now_ns)
            before, request.state = request.state, advance(request.state, RequestEvent.CANCELLED)
            if before in (RequestState.RUNNING, RequestState.FINISHED):
                aborts.append(request)
            elif before is not RequestState.CANCELLING:
                self._end_waiting(request, before, RequestCancelledError("cancelled by the client"))
        self._abort(aborts)

    def credit(self, client: ClientPeer, credit: Credit) -> None:
        """Pass credit on to the workers that run the client's requests."""
        grants: dict[str, tuple[WorkerPeer, list[CreditLine]]] = {}
        for line in credit.lines:
            request = client.requests.get(line.request)
            if request is None or request.away or request.attempt != line.attempt:
                continue
            request.window = line.window
            request.units = max(request.units, line.next)
            if request.worker is not None:
                plain = CreditLine(request=line.request, attempt=line.attempt, next=line.next, window=line.window)
                grants.setdefault(request.worker.name, (request.worker, []))[1].append(plain)
        for worker, lines in grants.values():
            self.grant(worker, client, lines)

    def grant(self, worker: WorkerPeer, client: ClientPeer, lines: list[CreditLine]) -> None:
        """Tell a worker what a client's streams may send."""
        for batch in batches(lines, lambda _: LINE_BYTES):
            grant = Grant(client=client.number, instance=client.instance, lines=batch)
            self._outbox.send(worker.routing_id, codec.pack(grant))

    def client_away(self, client: ClientPeer) -> None:
        """Its connection is lost: what it waits for is kept for it. What it has cancelled, or not claimed since its former
        connection was lost, is not."""
        stopped: list[Request] = []
        for request in list(client.requests.values()):
            if request.away or request.state not in _LIVING:
                stopped.append(request)
            else:
                self.read(request, client, away=True)
        self.abandon(stopped, RequestEvent.CLIENT_LOST)

    def client_left(self, client: ClientPeer) -> None:
        """Nobody reads any more: stop all of it."""
        self.abandon(list(client.requests.values()), RequestEvent.CLIENT_LOST)

    def abandon(self, requests: Iterable[Request], event: RequestEvent = RequestEvent.GAVE_UP) -> None:
        """Stop requests without a terminal to their reader."""
        aborts: list[Request] = []
        for request in requests:
            before, request.state = request.state, advance(request.state, event)
            if before in _LIVING:
                self._observer.given_up(request, event.name.lower())
            if before in AT_WORKER:
                self._timers.cancel(request.deadline)
                self._unread(request)
                if before is not RequestState.CANCELLING:
                    aborts.append(request)
            else:
                self._unqueue(request, before)
                self.retire(request)
        self._abort(aborts)

    def deadline(self, request: Request) -> None:
        """The time is up: tell the client now, and why it has waited so long, and have the worker stop."""
        if request.state not in _COUNTED:
            self._observer.ended(request, "expired", DeadlineExceededError.code, self._timers.now_ns)
        state, why = request.state.name, self.explain(request)
        told = f"deadline passed while the request was {state.lower()}{why and ': '}{why}"
        self._cut_short(request, RequestEvent.DEADLINE, DeadlineExceededError(told, state=state))

    def stop(self, requests: Iterable[Request], error: FabricError) -> None:
        """End what clients wait for, at an operator's wish: tell the client now, and have the worker stop. One that is away
        is told when it comes back."""
        for request in requests:
            client = request.client
            if client is not None and client.away:
                client.stopped[request.request] = error
            if request.state not in _COUNTED:
                self._observer.ended(request, "cancelled", error.code, self._timers.now_ns)
            self._cut_short(request, RequestEvent.GAVE_UP, error)

    def _cut_short(self, request: Request, event: RequestEvent, error: FabricError) -> None:
        """Give a request its terminal now, wherever it is."""
        before, request.state = request.state, advance(request.state, event)
        if before in AT_WORKER:
            client = request.client
            assert client is not None
            self._timers.cancel(request.deadline)
            self._unread(request)
            self._outbox.end(client, request.request, request.attempt, error)
            if before is not RequestState.CANCELLING:
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
        if before is RequestState.QUEUED:
            self._observer.ended(request, "failed", error.code, self._timers.now_ns)
        self._end_waiting(request, before, error)

    def _unqueue(self, request: Request, before: RequestState) -> None:
        if before is RequestState.QUEUED:
            self._leave_queue(request)

    def _abort(self, requests: list[Request]) -> None:
        """One ABORT per worker and client, if that holds them all."""
        groups: dict[tuple[str, int], tuple[WorkerPeer, list[tuple[int, int]]]] = {}
        for request in requests:
            worker = request.worker
            assert worker is not None
            _, attempts = groups.setdefault((worker.name, request.instance), (worker, []))
            attempts.append((request.request, request.attempt))
        for (_, instance), (worker, attempts) in groups.items():
            self.abort(worker, instance, attempts)

    def abort(self, worker: WorkerPeer, instance: int, attempts: list[tuple[int, int]]) -> None:
        """Have a worker stop these (request, attempt) of a client."""
        for batch in batches(attempts, lambda _: ATTEMPT_BYTES):
            self._outbox.send(worker.routing_id, codec.pack(Abort(instance=instance, attempts=batch)))

    # ── the worker's side ───────────────────────────────────────────────────────────────────────────────────────────

    def worker_lost(self, worker: WorkerPeer, error: FabricError) -> list[Request]:
        """End everything a worker had; its clients send the next attempt.

        Returns:
            What it may bring back.
        """
        told: list[tuple[ClientPeer | None, Notice]] = []
        carried: list[Request] = []
        for request in list(worker.live.values()):
            self._remember(request)
            before, request.state = request.state, advance(request.state, RequestEvent.WORKER_LOST)
            cancelled = before is RequestState.CANCELLING
            if before not in TERMINAL_GIVEN:
                reason = RequestCancelledError("cancelled by the client") if cancelled else error
                told.append((request.client, Notice(request.request, request.attempt, reason)))
                if before not in _COUNTED:
                    self._observer.ended(request, "failed", error.code, self._timers.now_ns)
            self._observer.befell(request, "zfabric.worker_lost", self._timers.now_ns, worker=worker.name)
            if before in _CARRIED:
                carried.append(request)
            self.retire(request)
        self._tell(told)
        return carried

    def engine_stalled(self, worker: WorkerPeer, engine: Engine, silent_ms: int) -> None:
        """An engine hangs: its requests go elsewhere, its slots stay taken until it answers."""
        error = EngineStalledError(
            f"engine of worker {worker.name!r} made no progress for {silent_ms} ms",
            worker=worker.name,
            silent_ms=silent_ms,
        )
        live = [request for request in worker.live.values() if request.engine is engine]
        running = [request for request in live if request.state not in TERMINAL_GIVEN]
        self._tell((request.client, Notice(request.request, request.attempt, error)) for request in running)
        for request in running:
            self._remember(request)
            if request.state is RequestState.RUNNING:
                self._observer.ended(request, "failed", error.code, self._timers.now_ns)
            self._observer.befell(request, "zfabric.engine_stalled", self._timers.now_ns, worker=worker.name)
        self.abandon(running)

    def _tell(self, told: Iterable[tuple[ClientPeer | None, Notice]]) -> None:
        """Give terminals of many clients, each client's together."""
        notices: dict[int, tuple[ClientPeer, list[Notice]]] = {}
        for client, notice in told:
            if client is not None:
                notices.setdefault(client.number, (client, []))[1].append(notice)
        for client, lines in notices.values():
            self._outbox.end_all(client, lines)

    def _remember(self, request: Request) -> None:
        """An attempt is about to end through no fault of its client's, who may submit the next."""
        if request.client is not None and request.state in _CARRIED:
            request.client.remember(request, self._timers.now_ns)
