"""Requests at the controller: from SUBMIT to a worker. Those that wait are in `queues`, and their endings in `endings`.

Rule 1: bodies are never opened. A body is kept while its request waits, and dropped when a worker has it: after a loss the
        client, which has the prompt and all tokens so far, submits the next attempt.
Rule 2: whatever frees a slot or brings a host is followed by `fill`, and whatever changes who hosts what by
        `Queues.settle`, before the next message is looked at.

What each event costs, where n requests wait for a model that h workers host, and a worker hosts m models, of which w have
waiting requests that it cannot take now (they have slots of their own). There are eight demands at most, so they do not
count; costs are amortised. None grows with what a client has in flight, but for the end of that client; lists cost what they
are long.

| event | cost |
|---|---|
| SUBMIT, sent on at once | O(h) up to 16 hosts, O(log h) beyond, but O(h) for policies that say so; and as the next row |
| a request comes to a worker or leaves it | O(1) in a fabric of up to 16 workers, O(m log h) beyond |
| SUBMIT that has to wait | O(log n) |
| CANCEL, for each request; a deadline | O(log n) where it waits, else O(1) |
| CREDIT, GRANT, for each line; the question `release` | O(1) |
| ENDS, for each request | as above, and O(w + log n) for each slot that became free |
| ENDS that opens a circuit or closes one, and its time | O(hosts that are out + m), and as ENDS for each slot |
| LOAD | O(m), and as ENDS for each slot that it announces |
| HELLO of a worker | O(its models and aliases), and O(1) for each carried request |
| loss of a worker, or a model that it hosts no more | O(its models, aliases and requests) |
| HELLO of a client, CLAIMS | O(1) for each claim |
| loss of a client | O(log n) for each of its requests |
| last host of a model leaves, or a name moves | O(log n) for each request that moves with it |
| end of a model's memory, or of what nobody can do | O(log n) for each request that ends |
| each turn while the controller drains | O(clients) |
| queries: `models`, `workers`, `status` | O(all hostings), O(workers), O(workers + models) |
| queries: `requests`, `clients` | O(requests), and for `requests` O(n log n) for each queue that is shown |
| query `queue` | O(n + slots) for each queue |
| each look at how many replicas there should be; query `scaling` | O(hosts of models that have a rule) |
| a chunk | O(1): one look into the routes |
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from zfabric.core.controller.adapters import Adapters
from zfabric.core.controller.affinity import Affinities
from zfabric.core.controller.candidates import Candidates
from zfabric.core.controller.cells import dispatch_of, find_worker
from zfabric.core.controller.circuits import Circuits
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.decisions import Decisions
from zfabric.core.controller.dispatch import Ask, Chooser
from zfabric.core.controller.endings import Endings
from zfabric.core.controller.figures import Decision
from zfabric.core.controller.hosting import Demand, Hosting, Model, demand_of
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.observer import Observer
from zfabric.core.controller.outbox import Outbox
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer
from zfabric.core.controller.queues import Queues, cannot_continue, cannot_serve
from zfabric.core.controller.quotas import Account, Quotas
from zfabric.core.controller.reasons import Reasons
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.request_state import RequestEvent, RequestState, advance
from zfabric.core.controller.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import (
    FabricError,
    NoWorkerError,
    ProtocolError,
    QueueFullError,
    QuotaExceededError,
    UnknownModelError,
    WorkerLostError,
)
from zfabric.ids import milliseconds
from zfabric.limits import PREFIX_HASH_BYTES
from zfabric.wire import codec
from zfabric.wire.messages import Submit


class _Place(NamedTuple):
    """What a request gets for an attempt that it made before: its place in the line, the model that began the answer, and
    whether it may wait where no further request may. What was `lost` with its worker is within its key's limits already."""

    arrival: int
    model: str
    kept: bool
    lost: bool = False


class Scheduler:
    """Accepts, queues and dispatches requests; `endings` ends them."""

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        timers: Timers,
        outbox: Outbox,
        routes: Routes,
        rng: random.Random,
        journal: Journal,
    ) -> None:
        self._config = config
        self._registry = registry
        self._timers = timers
        self._outbox = outbox
        self._journal = journal
        self._arrivals = itertools.count(1)
        self.chooser = Chooser(config.policy)
        self._rng = rng
        self.affinities = Affinities()
        self.decisions = Decisions()
        self.circuits = Circuits(config, registry, timers, journal, rng)
        self.circuits.fill = lambda worker: self.fill(worker, timers.now_ns)
        self.observer = Observer(journal)
        self.quotas = Quotas()
        self.figures = self.observer.figures
        self.queues = Queues(
            config,
            registry,
            timers,
            self.figures,
            lambda request, error: self.endings.give_up(request, error),
            self._offer,
            self.circuits.fit,
        )
        self.endings = Endings(registry, timers, outbox, routes, self.observer, self.queues.remove, self.circuits)
        self.endings.explain = lambda request: Reasons(registry, self.queues).of(request).text
        self.adapters = Adapters(config, registry, timers, outbox, journal, rng)
        self.adapters.give_up = self.endings.give_up
        self.adapters.fill = self.circuits.fill
        self.queues.awaited, self.queues.queued = self.adapters.awaited, self.adapters.asked
        self.draining = False

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, client: ClientPeer, envelope: Submit, body: bytes, now_ns: int) -> None:
        """Accept a request, or end it at once with the reason. An attempt that is known is ignored: it was said twice."""
        known = client.requests.get(envelope.request)
        if known is not None and known.attempt == envelope.attempt:
            return
        worker: WorkerPeer | None = None
        model: Model | None = None
        try:
            place = self._replace(client, envelope, known)
            account = self._admit(client, envelope, len(body), place, now_ns)
            if envelope.worker:
                worker, host = self._worker_asked(client, envelope)
            else:
                model = self._model_asked(client, envelope, place)
                host = self._choose(model, demand_of(envelope.operation, envelope.resume_from), envelope, now_ns)
                if host is None:
                    self._check_room(model, envelope, len(body), place)
        except FabricError as error:
            self.observer.refused(client, model, envelope, len(body), error, now_ns)
            self._outbox.end(client, envelope.request, envelope.attempt, error)
            return
        request = self._accept(client, envelope, body, place, now_ns)
        if account is not None:
            request.account = account
            account.enter(request, now_ns, again=place is not None and place.lost)
        if host is not None:
            worker, model = host.worker, host.model
        request.model = model
        if worker is not None:
            self._send_to(request, worker, host, now_ns, "asked" if envelope.worker else "chosen")
        else:
            assert model is not None
            self.queues.add(model, request)

    def _replace(self, client: ClientPeer, envelope: Submit, known: Request | None) -> _Place | None:
        """What the request keeps of its former attempt, which is stopped where it still runs.

        Raises:
            WorkerLostError: This attempt was lost; the next one may be made.
            ProtocolError: This attempt had its terminal, or a later one had, or is there.
        """
        number, attempt = envelope.request, envelope.attempt
        if known is not None and known.attempt > attempt:
            # Whoever counts anew would wait for what never comes: its answers are those of the later attempt.
            raise ProtocolError(
                f"attempt {attempt} of request {number} was replaced by attempt {known.attempt}", attempt=known.attempt
            )
        former = client.former.get(number)
        if former is not None and former.attempt == attempt:
            raise WorkerLostError(f"attempt {attempt} of request {number} was lost with its worker", attempt=attempt)
        if (client.instance, number, attempt) in self._registry.live or (
            former is not None and former.attempt > attempt
        ):
            raise ProtocolError(f"attempt {attempt} of request {number} has ended", attempt=attempt)
        if known is not None:
            # One that waited leaves its room to the next; one that ran has none to leave.
            waited = known.state is RequestState.QUEUED
            place = _Place(known.arrival, known.model.name, waited) if known.model is not None else None
            self.endings.abandon([known])
            return place
        if former is None:
            return None
        del client.former[envelope.request]
        return _Place(former.arrival, former.model, kept=True, lost=True)

    def _admit(
        self, client: ClientPeer, envelope: Submit, size: int, place: _Place | None, now_ns: int
    ) -> Account | None:
        """Whose limits the request will count for. Raises: FabricError, why no such request of the client's is accepted now."""
        lost = place is not None and place.lost
        client.grant.check_request(envelope.priority, 0 if lost else size)
        if self.draining and place is None:
            raise NoWorkerError("the controller is draining and takes no new requests", draining=True)
        if len(client.requests) >= self._config.client_requests_max:
            raise QuotaExceededError(
                f"client has {len(client.requests)} requests in flight, limit is {self._config.client_requests_max}",
                in_flight=len(client.requests),
            )
        account = self.quotas.of(client.grant, now_ns)
        if account is not None and not lost:
            account.check(now_ns)
        return account

    def _worker_asked(self, client: ClientPeer, envelope: Submit) -> tuple[WorkerPeer, Hosting | None]:
        """The one worker that will do, and what it hosts where a model is named. Raises: FabricError, if there is none.

        An operator's call needs no slot. Anything else does, and is not queued for one worker.
        """
        client.grant.check_operator("a call to one worker")
        worker = find_worker(self._registry, envelope.worker)
        if worker is None:
            raise NoWorkerError(f"no worker is named {envelope.worker!r}", worker=envelope.worker)
        call = envelope.operation == "operate"
        if call and not envelope.model:
            return worker, None
        client.grant.check_model(envelope.model)
        aliased = (host for host in worker.hosts.values() if envelope.model in host.info.aliases)
        host = worker.hosts.get(envelope.model) or next(aliased, None)
        if host is None:
            raise UnknownModelError(
                f"worker {worker.name!r} serves no model named {envelope.model!r}",
                worker=worker.name,
                model=envelope.model,
            )
        demand = demand_of(envelope.operation, envelope.resume_from)
        if not call and not host.suits(demand):
            raise cannot_serve(host.model, demand)
        if not call and not host.free:
            raise NoWorkerError(
                f"worker {worker.name!r} takes no request for {host.model.name!r} now", worker=worker.name
            )
        return worker, host

    def _model_asked(self, client: ClientPeer, envelope: Submit, place: _Place | None) -> Model:
        """The model that is to serve the request. Raises: FabricError, why none can."""
        client.grant.check_model(envelope.model)
        model = self._registry.find(envelope.model)
        if envelope.resume_from and place is not None and (model is None or model.name != place.model):
            # The name stands for another model now, and only the one that began the answer can go on with it.
            model = self._registry.models.get(place.model)
            if model is None:
                raise cannot_continue(place.model)
        if model is None:
            coming = envelope.model in self._registry.directives.scaled or self.adapters.offered(envelope.model)
            if not self.queues.recovering and not coming:
                raise UnknownModelError(f"no worker serves a model named {envelope.model!r}", model=envelope.model)
            # Workers may still be on their way back to a controller that has just started, or be started for the request, or
            # load it as an adapter.
            model = self._registry.model(envelope.model)
        demand = demand_of(envelope.operation, envelope.resume_from)
        error = self.queues.refusal(model, demand, self._registry.supply(model, demand))
        if error is not None:
            raise error
        return model

    def _check_room(self, model: Model, envelope: Submit, size: int, place: _Place | None) -> None:
        """Raises: QueueFullError, the request would have to wait, and nothing more may."""
        queued = model.queue.count(demand_of(envelope.operation, envelope.resume_from))
        if queued >= self._config.queue_depth_max and not (place is not None and place.kept):
            raise QueueFullError(
                f"queue for {model.name!r} holds {queued} requests, limit is {self._config.queue_depth_max}",
                model=model.name,
                queued=queued,
            )
        if self.figures.queued_bytes + size > self._config.queue_bytes_max:
            raise QueueFullError(
                f"queues hold {self.figures.queued_bytes} bytes, limit is {self._config.queue_bytes_max}",
                queued_bytes=self.figures.queued_bytes,
            )

    def _accept(self, client: ClientPeer, envelope: Submit, body: bytes, place: _Place | None, now_ns: int) -> Request:
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
            asked=envelope.model,
            arrival=place.arrival if place is not None else next(self._arrivals),
        )
        request.body, request.size = body, len(body)
        request.accepted_ns = now_ns
        request.traceparent, request.tracestate = envelope.traceparent, envelope.tracestate
        request.affinity, request.prefix, request.prefix_block = (
            envelope.affinity,
            envelope.prefix,
            envelope.prefix_block,
        )
        request.wanted = envelope.worker
        client.requests[request.request] = request
        self.observer.submitted(client, request, envelope, now_ns)
        if envelope.deadline_ms is not None:
            self.endings.expect(request, now_ns + milliseconds(envelope.deadline_ms))
        return request

    # ── to a worker ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _choose(self, model: Model, demand: Demand, asked: Submit | Request, now_ns: int) -> Hosting | None:
        """The host that takes a request now; None where nobody can, or nobody may."""
        if model.name in self._registry.directives.paused:
            return None
        candidates = self._registry.candidates(self._registry.supply(model, demand))
        if not len(candidates):
            return None
        ask = self.ask_of(candidates, model, asked, now_ns)
        self.decisions.asked = ask
        host = self.chooser.choose(ask, now_ns)
        assert isinstance(host, Hosting)
        return host

    def ask_of(self, candidates: Candidates, model: Model, asked: Submit | Request, now_ns: int) -> Ask:
        """What a policy is shown of a request."""
        return Ask(
            candidates,
            self._rng,
            priority=asked.priority,
            affinity=asked.affinity,
            held=self.affinities.find(asked.affinity, model, now_ns) if asked.affinity else None,
            imbalance_requests=self._config.imbalance_requests,
            imbalance_ratio=self._config.imbalance_ratio,
            blocks=len(asked.prefix) // PREFIX_HASH_BYTES,
            block_size=asked.prefix_block,
            matched=lambda: self._registry.placement.matched(model, asked.prefix),
            cold_s=lambda: self.adapters.cold_s(model.name),
        )

    def _send_to(
        self, request: Request, worker: WorkerPeer, host: Hosting | None, now_ns: int, decision: Decision
    ) -> None:
        assert request.client is not None
        body, request.body = request.body, None
        assert body is not None
        request.state = advance(request.state, RequestEvent.DISPATCHED)
        request.dispatched_ns = now_ns
        self.decisions.note(request, worker, host, decision, self._config.policy, now_ns)
        self.endings.place(request, worker, host)
        worker.dispatched += 1
        if host is not None:
            self.adapters.dispatched(host)
        if host is not None and request.affinity:
            self.affinities.note(request.affinity, host, now_ns)
        self.observer.dispatched(request, worker, decision, now_ns)
        if request.prefix and host is not None:
            self._registry.placement.placed(host, request.prefix, request.prefix_block, self._config.policy)
        envelope = dispatch_of(request, worker, now_ns)
        self._outbox.send(worker.routing_id, (codec.pack_envelope(envelope), body))

    def fill(self, worker: WorkerPeer, now_ns: int) -> None:
        """Give a worker with free slots what waits and suits it."""
        while (found := self.queues.take(worker)) is not None:
            request, host = found
            self._send_to(request, worker, host, now_ns, "queued")

    def _offer(self, request: Request, model: Model) -> None:
        """Have a model serve a request that waited for another."""
        request.model = model
        host = self._choose(model, request.demand, request, self._timers.now_ns)
        if host is not None:
            self._send_to(request, host.worker, host, self._timers.now_ns, "moved")
        else:
            self.queues.add(model, request)
