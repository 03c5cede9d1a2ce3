"""Requests at the controller: from SUBMIT to a worker. Their endings are in `endings`.

Rule: bodies are never opened. A body is kept while its request waits, and dropped when a worker has it: after a loss the
client, which has the prompt and all tokens so far, submits the next attempt.
"""

from __future__ import annotations

import random

from zfabric.core.broker_config import BrokerConfig
from zfabric.core.dispatch import find_policy
from zfabric.core.endings import DeskCounters, Endings
from zfabric.core.outbox import Outbox
from zfabric.core.registry import ClientPeer, Hosting, Model, Registry, Request, WorkerPeer
from zfabric.core.request_state import RequestEvent, RequestState, advance
from zfabric.core.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import (
    FabricError,
    NoWorkerError,
    QueueFullError,
    QuotaExceededError,
    UnknownModelError,
    UnsupportedOperationError,
    WorkerLostError,
)
from zfabric.ids import milliseconds
from zfabric.limits import MODEL_MEMORY_MS
from zfabric.wire import codec
from zfabric.wire.messages import Dispatch, Submit


class RequestDesk:
    """Accepts, queues and dispatches requests; `endings` ends them."""

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
        self._rng = rng
        self._policy = find_policy(config.policy)
        self._waiting: dict[str, Model] = {}
        self.counters = DeskCounters()
        self.endings = Endings(registry, timers, outbox, routes, self.counters, self._unqueue)
        self.draining = False
        self.recovering = False

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, client: ClientPeer, envelope: Submit, body: bytes, now_ns: int) -> None:
        """Accept a request, or end it at once with the reason."""
        known = client.requests.get(envelope.request)
        if known is not None:
            if known.attempt >= envelope.attempt:
                return
            self.endings.abandon([known])
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
            request.deadline = self._timers.at(request.deadline_ns, lambda _: self.endings.deadline(request))
        if envelope.worker:
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
        self.endings.place(request, worker, host)
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
            lock=request.lock,
        )
        self._outbox.send(worker.routing_id, (codec.pack_envelope(envelope), body))

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

    def _unqueue(self, request: Request) -> None:
        assert request.model is not None
        request.model.queue.remove(request)
        self._left_queue(request)

    # ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

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
                self.endings.give_up(request, NoWorkerError(f"no worker serves {model.name!r}", model=model.name))
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
            self.endings.give_up(request, _cannot_continue(model))


def _suits(host: Hosting, request: Request) -> bool:
    """Whether this host can do what is asked, and go on where the reader is."""
    return (host.resumes or not request.resume_from) and request.operation in host.info.capabilities


def _before(first: Model, second: Model) -> bool:
    """Whether the first model's queue goes first: by priority, then by length."""
    one, other = first.queue, second.queue
    return (one.peek().priority, -len(one)) < (other.peek().priority, -len(other))


def _cannot_continue(model: Model) -> WorkerLostError:
    return WorkerLostError(f"no worker of {model.name!r} can go on in mid-stream", model=model.name, resumable=False)
