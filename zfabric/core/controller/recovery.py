"""Putting streams together again whose connections were lost.

Workers go on without a controller, and clients go on waiting. Both come back in any order and say what they have: a worker's
`Carried`, a client's `Claim`. When both name the same attempt and the client opens its lock, the stream goes on at the same
worker, from the first unit that the client lacks. There are four ways to be apart, and one way to be together again:

* the client's connection was lost: its requests are here, `away` until it claims them;
* the worker's connection was lost: what it had is remembered as a `_Loss`, which waits for both sides;
* the controller is new, `active` for some time: it knows nobody, and waits for whoever comes;
* the client came from another controller, of which its workers have others: they are asked (`Searches`).

What is alone when its time is over ends: a claim with WorkerLostError or ConnectionLostError, after which the client submits
its next attempt; a carried request by being stopped. Nothing else can be claimed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from zfabric.core.controller.affinity import Affinities
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.endings import Endings
from zfabric.core.controller.grants import Grants
from zfabric.core.controller.hosting import Model
from zfabric.core.controller.observer import Observer
from zfabric.core.controller.outbox import Notice, Outbox
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.request_state import RequestEvent, RequestState, advance
from zfabric.core.controller.searches import Searches, Sought
from zfabric.core.timers import Timers
from zfabric.errors import ConnectionLostError, FabricError, QuotaExceededError, WorkerLostError
from zfabric.ids import milliseconds
from zfabric.limits import LIST_LENGTH_MAX, SLOTS_MAX
from zfabric.wire.messages import Carried, Claim

Key = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class _Loss:
    """One lost connection of a worker, and the attempts that went with it."""

    worker: str
    instance: int
    requests: dict[Key, Request]


class Recovery:
    """Matches claims with carried requests.

    A claim that waits is a CLAIMED request of its client, and a carried request that waits is a RECOVERED one of its worker;
    the tables here only say for whom it is worth waiting.
    """

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        endings: Endings,
        observer: Observer,
        timers: Timers,
        outbox: Outbox,
        affinities: Affinities,
    ) -> None:
        self._config = config
        self._affinities = affinities
        self._registry = registry
        self._endings = endings
        self._observer = observer
        self._timers = timers
        self._outbox = outbox
        self._losses: dict[Key, _Loss] = {}
        #: Who carries what, while anybody may.
        self._carriers: dict[Key, dict[str, WorkerPeer]] = {}
        self._lines: Counter[str] = Counter()
        self._over_ns = timers.now_ns + milliseconds(config.recovery_ms)
        #: Whether this controller is new, and anybody may still come back to it.
        self.active = bool(config.recovery_ms)
        self.matched = 0
        self.searches = Searches(registry, timers, outbox, config.claim_ms)
        self.searches.found, self.searches.missed = self._found, self._missed

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def worker_lost(self, worker: WorkerPeer, requests: Iterable[Request]) -> None:
        """A worker's connection is gone: it may come back with these requests, and their clients may claim them."""
        loss = _Loss(worker.name, worker.instance, {request.key: request for request in requests})
        if not loss.requests:
            return
        self._losses |= dict.fromkeys(loss.requests, loss)
        until_ns = self._timers.now_ns + milliseconds(self._config.claim_ms)
        if self.active:
            until_ns = max(until_ns, self._over_ns)
        self._timers.judge_at(until_ns, lambda _: self._loss_over(loss))

    def worker_back(self, worker: WorkerPeer, carried: Iterable[Carried]) -> None:
        """A worker says what it runs. Attempts that nobody can be waiting for are stopped, and hold their slots until the
        worker says that they have."""
        strays: dict[int, list[tuple[int, int]]] = {}
        stopped: list[Request] = []
        granted = Grants()
        for line in carried:
            key = (line.instance, line.request, line.attempt)
            if key in worker.live:
                continue
            loss = self._loss_of(key, line.lock)
            returned = loss is not None and (loss.worker, loss.instance) == (worker.name, worker.instance)
            if returned and self._is_replaced(key):
                del self._losses[key]
                returned = False
            if not returned and not self._may_bring(worker):
                if line.finished or worker.in_flight >= SLOTS_MAX:
                    strays.setdefault(line.instance, []).append((line.request, line.attempt))
                else:
                    stopped.append(self._enter(worker, line))
                continue
            request = self._enter(worker, line)
            if loss is not None:
                former = loss.requests[key]
                request.deadline_ns = former.deadline_ns
                self._observer.came_back(request, former, self._timers.now_ns)
            if self.active:
                self._carriers.setdefault(key, {})[worker.name] = worker
            claimed = self._claimed(key)
            if claimed is not None:
                self._match(claimed, request, granted)
        granted.send(self._endings)
        self._endings.abandon(stopped)
        for instance, attempts in strays.items():
            self._endings.abort(worker, instance, attempts)

    def _is_replaced(self, key: Key) -> bool:
        """Whether the next attempt waits, and somebody can do it. Otherwise its client will claim this one."""
        client = self._registry.clients.get(key[0])
        request = client.requests.get(key[1]) if client is not None else None
        if request is None or request.model is None or request.state is not RequestState.QUEUED:
            return False
        return request.attempt > key[2] and bool(self._registry.supply(request.model, request.demand).hosts)

    def _may_bring(self, worker: WorkerPeer) -> bool:
        """Whether it may carry what this controller never saw, of which nobody carries more than one list."""
        if not self.active:
            return False
        self._lines[worker.name] += 1
        return self._lines[worker.name] <= LIST_LENGTH_MAX

    def _enter(self, worker: WorkerPeer, line: Carried) -> Request:
        request = Request(
            None,
            instance=line.instance,
            request=line.request,
            attempt=line.attempt,
            operation=line.operation,
            state=RequestState.RECOVERED,
        )
        request.lock = line.lock
        host = worker.hosts.get(line.model)
        if line.model:
            request.model = host.model if host is not None else Model(line.model)
        self._endings.place(request, worker, host, finished=line.finished)
        return request

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, client: ClientPeer, claims: Iterable[Claim]) -> None:
        """A client says what it waits for."""
        granted = Grants()
        refused: list[Notice] = []
        sought: list[Sought] = []
        for claim in claims:
            try:
                self._claim(client, claim, granted, sought)
            except FabricError as error:
                refused.append(Notice(claim.request, claim.attempt, error))
        granted.send(self._endings)
        self._outbox.end_all(client, refused)
        self.searches.begin(sought)

    def _claim(self, client: ClientPeer, claim: Claim, granted: Grants, sought: list[Sought]) -> None:
        """Take one claim, or note that it is to be looked for. Raises: FabricError, why it is in vain."""
        # Who may submit nothing has nothing to claim, and is not to hold what waits for a worker.
        client.grant.check_client()
        stopped = client.stopped.pop(claim.request, None)
        if stopped is not None:
            raise stopped
        known = client.requests.get(claim.request)
        if known is not None and known.attempt < claim.attempt:
            # The client went on to another attempt, and that SUBMIT was lost on its way.
            self._endings.abandon([known])
        elif known is not None:
            if known.attempt > claim.attempt:
                raise _nobody_has_it()
            if known.away:
                self._take_over(client, known, claim, granted)
            return
        if len(client.requests) >= self._config.client_requests_max:
            raise QuotaExceededError(f"client has {len(client.requests)} requests in flight already")
        key = (client.instance, claim.request, claim.attempt)
        loss = self._loss_of(key, client.lock)
        moved = loss is None and claim.moved and (bool(claim.worker) or client.may_search())
        if loss is None and not self.active and not moved:
            raise _nobody_has_it()
        claimed = self._hold(client, claim)
        if moved:
            sought.append(Sought(claimed, claim.worker))
        if loss is not None:
            self._endings.expect(claimed, loss.requests[key].deadline_ns)
        for carried in self._carried(key, loss):
            if self._match(claimed, carried, granted):
                return

    def _take_over(self, client: ClientPeer, request: Request, claim: Claim, granted: Grants) -> None:
        """The request is still here, as it was when the client's connection was lost, or has finished."""
        if request.lock != client.lock:
            raise _nobody_has_it()
        _check_grant(client, request)
        self.matched += 1
        self._observer.befell(request, "zfabric.client_back", self._timers.now_ns)
        request.window = claim.window
        self._endings.read(request, client)
        if request.worker is not None:
            granted.add(request, claim.next)

    def _hold(self, client: ClientPeer, claim: Claim) -> Request:
        request = Request(
            client,
            instance=client.instance,
            request=claim.request,
            attempt=claim.attempt,
            operation="generate",
            state=RequestState.CLAIMED,
            window=claim.window,
            resume_from=claim.next,
        )
        request.affinity = claim.affinity
        client.requests[claim.request] = request
        return request

    def _found(self, worker: WorkerPeer, carried: Iterable[Carried]) -> set[Key]:
        """A worker says that it has what clients claim that came from another controller. Returns what is settled by that."""
        granted = Grants()
        settled: set[Key] = set()
        for line in carried:
            key = (line.instance, line.request, line.attempt)
            claimed, known = self._claimed(key), worker.live.get(key)
            if claimed is None or claimed.client is None or line.lock != claimed.client.lock:
                continue
            request = known or self._enter(worker, line)
            if request.state is RequestState.RECOVERED and self._match(claimed, request, granted):
                settled.add(key)
            if known is None and request.state is RequestState.RECOVERED:
                # The client may not have it, and it is not this controller's.
                self._endings.retire(request)
        granted.send(self._endings)
        return settled

    def _missed(self, claimed: Request, denied: bool) -> None:
        """No worker has what is claimed, as far as is known. A new controller waits for whoever comes."""
        waits = self.active and not denied
        if claimed.state is RequestState.CLAIMED and claimed.key not in self._losses and not waits:
            self._endings.give_up(claimed, _nobody_has_it())

    def moved_on(self, client: ClientPeer, request: int, attempt: int) -> None:
        """A client submits this attempt, so it will not claim the one before."""
        key = (client.instance, request, attempt - 1)
        if self._loss_of(key, client.lock) is not None:
            self._settle(key, self._losses.pop(key), _nobody_has_it())

    # ── together, or over ───────────────────────────────────────────────────────────────────────────────────────────

    def finish(self) -> int:
        """The controller is new no longer: end what is alone, but for what a later loss still waits for.

        Returns:
            Claims that found nobody, and carried requests that nobody claimed.
        """
        self.active = False
        alone_in_all = 0
        carriers, self._carriers = self._carriers, {}
        self._lines.clear()
        for client in self._registry.clients.values():
            for request in list(client.requests.values()):
                if request.state is RequestState.CLAIMED and request.key not in self._losses:
                    self._endings.give_up(request, _nobody_has_it())
                    alone_in_all += 1
        for key, workers in carriers.items():
            loss = self._losses.get(key)
            alone = [worker for worker in workers.values() if loss is None or worker.name != loss.worker]
            stopped = _recovered(key, alone)
            self._endings.abandon(stopped)
            alone_in_all += len(stopped)
        return alone_in_all

    def _loss_over(self, loss: _Loss) -> None:
        error = WorkerLostError(f"worker {loss.worker!r} did not come back with the request", worker=loss.worker)
        for key in loss.requests:
            if self._losses.get(key) is loss:
                del self._losses[key]
                self._settle(key, loss, error)

    def _settle(self, key: Key, loss: _Loss, error: FabricError) -> None:
        """Nobody has to wait for this attempt any more."""
        claimed = self._claimed(key)
        if claimed is not None:
            if claimed.client is not None:
                # The next attempt has the place that this one had before it was lost.
                claimed.client.remember(loss.requests[key], self._timers.now_ns)
            self._endings.give_up(claimed, error)
        self._endings.abandon(self._carried(key, loss))

    def _loss_of(self, key: Key, lock: bytes) -> _Loss | None:
        """The loss that the attempt went with, for whoever opens its lock."""
        loss = self._losses.get(key)
        return loss if loss is not None and loss.requests[key].lock == lock else None

    def _claimed(self, key: Key) -> Request | None:
        """The claim that waits for this attempt."""
        client = self._registry.clients.get(key[0])
        request = client.requests.get(key[1]) if client is not None else None
        if request is None or request.attempt != key[2] or request.state is not RequestState.CLAIMED:
            return None
        return request

    def _carried(self, key: Key, loss: _Loss | None) -> list[Request]:
        """What workers have brought back of this attempt."""
        workers = dict(self._carriers.get(key, {}))
        if loss is not None and (back := self._registry.workers.get(loss.worker)) is not None:
            workers[back.name] = back
        return _recovered(key, workers.values())

    def _match(self, claimed: Request, request: Request, granted: Grants) -> bool:
        """Give a request that a worker brought back its reader, if that may have it; the claim has served."""
        client, key = claimed.client, request.key
        assert client is not None
        if request.lock != client.lock:
            return False
        try:
            _check_grant(client, request)
        except FabricError as error:
            self._endings.give_up(claimed, error)
            return True
        self.matched += 1
        claimed.state = advance(claimed.state, RequestEvent.MATCHED)
        self._endings.retire(claimed)
        request.state = advance(request.state, RequestEvent.MATCHED)
        request.window, request.affinity = claimed.window, claimed.affinity
        if request.host is not None:
            self._affinities.note(request.affinity, request.host, self._timers.now_ns)
        self._endings.read(request, client)
        self._endings.expect(request, request.deadline_ns)
        granted.add(request, claimed.resume_from)
        self._endings.abandon(self._carried(key, self._losses.pop(key, None)))
        self._carriers.pop(key, None)
        return True


def _recovered(key: Key, workers: Iterable[WorkerPeer]) -> list[Request]:
    """What workers have brought back of an attempt, and nobody has claimed yet."""
    found = [worker.live.get(key) for worker in workers]
    return [request for request in found if request is not None and request.state is RequestState.RECOVERED]


def _check_grant(client: ClientPeer, request: Request) -> None:
    """A claim gives no more than a SUBMIT would have.

    Raises:
        PermissionDeniedError: The client may not use the model by any name that it has, or not call workers.
    """
    client.grant.check_client()
    if request.operation == "operate":
        client.grant.check_operator("a call to one worker")
    model = request.model
    if model is None or client.grant.allows_model(model.name):
        return
    if not any(client.grant.allows_model(alias) for alias in model.aliases):
        client.grant.check_model(model.name)


def _nobody_has_it() -> ConnectionLostError:
    return ConnectionLostError("the connection was lost, and no worker has the request any more")
