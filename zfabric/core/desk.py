"""Requests at the controller: from SUBMIT to the one terminal.

Rule 1: every accepted attempt gets exactly one terminal, here or from its worker.
Rule 2: a slot is taken by an entry in `WorkerPeer.live`, and free when the entry is gone; nothing is counted by hand.
Rule 3: sends are collected, never performed; the caller performs them in order.
Rule 4: bodies are never opened. A body is kept while its request waits, and dropped when a worker has it: after a loss
        the client, which has the prompt and all tokens so far, submits the next attempt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from zfabric.core.broker_config import BrokerConfig
from zfabric.core.dispatch import find_policy
from zfabric.core.outbox import Outbox, ends_of
from zfabric.core.registry import ClientPeer, Hosting, Model, Registry, Request, WorkerPeer, WorkerState
from zfabric.core.request_state import AT_WORKER, TERMINAL_GIVEN, RequestEvent, RequestState, advance
from zfabric.core.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import (
    DeadlineExceededError,
    EngineStalledError,
    FabricError,
    NoWorkerError,
    QueueFullError,
    QuotaExceededError,
    RequestCancelledError,
    UnknownModelError,
    UnsupportedOperationError,
    WorkerLostError,
)
from zfabric.ids import milliseconds
from zfabric.limits import MODEL_MEMORY_MS
from zfabric.wire import codec
from zfabric.wire.messages import Abort, Credit, CreditLine, Dispatch, Ends, Grant, Submit


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


class RequestDesk:
    """Accepts, queues, dispatches and ends requests."""

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        timers: Timers,
        outbox: Outbox,
        routes: Routes,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._routes = routes
        self._rng = rng
        self._policy = find_policy(config.policy)
        self._waiting: dict[str, Model] = {}
        self.counters = DeskCounters()
        self.draining = False
        self.recovering = False

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, client: ClientPeer, envelope: Submit, body: bytes, now_ns: int) -> None:
        """Accept a request, or end it at once with the reason."""
        known = client.requests.get(envelope.request)
        if known is not None:
            if known.attempt >= envelope.attempt:
                return
            self.abandon([known])
        try:
            model = self._admit(client, envelope, len(body))
        except FabricError as error:
            self.counters.rejected += 1
            self._outbox.end(client, envelope.request, envelope.attempt, error)
            return
        self.counters.submitted += 1
        request = Request(
            client,
            instance=client.instance,
            request=envelope.request,
            attempt=envelope.attempt,
            operation=envelope.operation,
            state=RequestState.QUEUED,
            priority=envelope.priority,
            window=envelope.window,
            resume_from=envelope.resume_from,
        )
        request.model, request.body, request.size = model, body, len(body)
        client.requests[request.request] = request
        if envelope.deadline_ms is not None:
            request.deadline_ns = now_ns + milliseconds(envelope.deadline_ms)
            request.deadline = self._timers.at(request.deadline_ns, lambda _: self._deadline(request))
        if envelope.worker:
            request.slotless = envelope.operation == "operate"
            self._send_to(request, self._registry.workers[envelope.worker], None, now_ns)
            return
        assert model is not None
        host = None if model.queue else self._choose(model, request)
        if host is not None:
            self._send_to(request, host.worker, host, now_ns)
        else:
            self._enqueue(model, request)

    def _admit(self, client: ClientPeer, envelope: Submit, size: int) -> Model | None:
        """The model whose queue takes the request. Raises: FabricError, why it is not accepted."""
        if self.draining:
            raise NoWorkerError("the controller is draining and takes no new requests")
        if len(client.requests) >= self._config.client_requests_max:
            raise QuotaExceededError(
                f"client has {len(client.requests)} requests in flight, limit is {self._config.client_requests_max}",
                in_flight=len(client.requests),
            )
        if envelope.worker:
            client.grant.check_operator("a call to one worker")
            if envelope.worker not in self._registry.workers:
                raise NoWorkerError(f"no worker is named {envelope.worker!r}", worker=envelope.worker)
            return None
        client.grant.check_model(envelope.model)
        model = self._registry.find(envelope.model)
        if model is None:
            if not self.recovering:
                raise UnknownModelError(f"no worker serves a model named {envelope.model!r}", model=envelope.model)
            # Workers may still be on their way back to a controller that has just started.
            model = self._registry.model(envelope.model)
        if model.hosts:
            if not model.supports(envelope.operation):
                raise UnsupportedOperationError(
                    f"model {model.name!r} does not support {envelope.operation}",
                    model=model.name,
                    operation=envelope.operation,
                )
            if envelope.resume_from and not any(hosting.resumes for hosting in model.hosts.values()):
                raise _cannot_continue(model)
        if len(model.queue) >= self._config.queue_depth_max and not envelope.attempt:
            raise QueueFullError(
                f"queue for {model.name!r} holds {len(model.queue)} requests, limit is {self._config.queue_depth_max}",
                model=model.name,
                queued=len(model.queue),
            )
        if self.counters.queued_bytes + size > self._config.queue_bytes_max:
            raise QueueFullError(
                f"queues hold {self.counters.queued_bytes} bytes, limit is {self._config.queue_bytes_max}",
                queued_bytes=self.counters.queued_bytes,
            )
        return model

    def _enqueue(self, model: Model, request: Request) -> None:
        model.queue.push(request)
        self.counters.queued_bytes += request.size
        self._waiting[model.name] = model
        if not model.hosts and model.forget is None:
            self.model_unhosted(model)

    # ── to a worker ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, model: Model, request: Request) -> Hosting | None:
        if not len(model.candidates):
            return None
        host = self._policy(model.candidates, self._rng)
        if host is None:
            return None
        assert isinstance(host, Hosting)
        if _suits(host, request):
            return host
        suited = [other for other in model.candidates if isinstance(other, Hosting) and _suits(other, request)]
        return min(suited, key=lambda other: other.queue_ratio, default=None)

    def _send_to(self, request: Request, worker: WorkerPeer, host: Hosting | None, now_ns: int) -> None:
        assert request.client is not None
        body, request.body = request.body, None
        assert body is not None
        request.state = advance(request.state, RequestEvent.DISPATCHED)
        request.dispatched_ns = now_ns
        self.place(request, worker, host)
        worker.dispatched += 1
        self.counters.dispatched += 1
        left_ms = None
        if request.deadline_ns is not None:
            left_ms = max(0, (request.deadline_ns - now_ns) // 1_000_000)
        envelope = Dispatch(
            client=request.client.number,
            instance=request.instance,
            request=request.request,
            attempt=request.attempt,
            operation=request.operation,
            model=request.model.name if request.model else "",
            priority=request.priority,
            deadline_ms=left_ms,
            window=request.window,
            resume_from=request.resume_from,
        )
        self._outbox.send(worker.routing_id, (codec.pack_envelope(envelope), body))

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

    def adopt(self, request: Request, client: ClientPeer) -> None:
        """Give a recovered request, which a worker runs, its reader."""
        assert request.worker is not None
        request.client, request.owner = client, client.number
        client.requests[request.request] = request
        self._routes.add(request.worker, client)

    def fill(self, worker: WorkerPeer, now_ns: int) -> None:
        """Give a worker with free slots what waits: the best priority first, then the longest line."""
        while self._waiting and worker.free > 0:
            best: Hosting | None = None
            for name in self._waiting if len(self._waiting) < len(worker.hosts) else worker.hosts:
                hosting = worker.hosts.get(name)
                if hosting is None or not hosting.model.queue or not hosting.open:
                    continue
                head = hosting.model.queue.peek()
                if _suits(hosting, head) and (best is None or _before(hosting.model, best.model)):
                    best = hosting
            if best is None:
                return
            request = best.model.queue.pop()
            self._left_queue(request)
            self._send_to(request, worker, best, now_ns)

    def _left_queue(self, request: Request) -> None:
        assert request.model is not None
        self.counters.queued_bytes -= request.size
        if not request.model.queue:
            self._waiting.pop(request.model.name, None)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def ends(self, worker: WorkerPeer, envelope: Ends, header: bytes, body: bytes, now_ns: int) -> None:
        """A worker ended some requests of one client: pass it on, and use the slots."""
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
        self.fill(worker, now_ns)

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

    # ── the client's side ───────────────────────────────────────────────────────────────────────────────────────────

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

    def _deadline(self, request: Request) -> None:
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

    def _give_up(self, request: Request, error: FabricError) -> None:
        """End a request that waits in vain."""
        before, request.state = request.state, advance(request.state, RequestEvent.GAVE_UP)
        self._end_waiting(request, before, error)

    def _unqueue(self, request: Request, before: RequestState) -> None:
        if before is RequestState.QUEUED:
            assert request.model is not None
            request.model.queue.remove(request)
            self._left_queue(request)

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

    # ── the worker's side ───────────────────────────────────────────────────────────────────────────────────────────

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

    def model_unhosted(self, model: Model) -> None:
        """A model lost its last worker: wait for another, but not for ever."""

        def forget(now_ns: int) -> None:
            model.forget = None
            if model.hosts:
                return
            if self.recovering:
                self.model_unhosted(model)
                return
            for request in model.queue.items():
                self._give_up(request, NoWorkerError(f"no worker serves {model.name!r}", model=model.name))
            self._registry.forget(model)

        self._timers.cancel(model.forget)
        wait_ms = self._config.recovery_ms if self.recovering else MODEL_MEMORY_MS
        model.forget = self._timers.at(self._timers.now_ns + milliseconds(wait_ms), forget)

    def hosts_changed(self, model: Model) -> None:
        """Hosts came or went: end what waits for something that no host offers."""
        if not model.hosts:
            self.model_unhosted(model)
            return
        self._timers.cancel(model.forget)
        model.forget = None
        if any(hosting.resumes for hosting in model.hosts.values()) or not model.queue:
            return
        stuck = [request for request in model.queue.items() if request.resume_from]
        for request in stuck:
            self._give_up(request, _cannot_continue(model))


def _suits(host: Hosting, request: Request) -> bool:
    """Whether this host can do what is asked, and go on where the reader is."""
    return (host.resumes or not request.resume_from) and request.operation in host.info.capabilities


def _before(first: Model, second: Model) -> bool:
    """Whether the first model's queue goes first: by priority, then by length."""
    one, other = first.queue, second.queue
    return (one.peek().priority, -len(one)) < (other.peek().priority, -len(other))


def _cannot_continue(model: Model) -> WorkerLostError:
    return WorkerLostError(f"no worker of {model.name!r} can go on in mid-stream", model=model.name, resumable=False)
