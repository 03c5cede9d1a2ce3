"""Who is there: clients, workers, models, and which worker hosts which model."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from enum import IntEnum
from typing import NamedTuple

from zfabric.core.access import Grant
from zfabric.core.dispatch import CANDIDATES_UNORDERED_MAX, Candidates, Line
from zfabric.core.hosting import Alias, Demand, Hosting, Model, Supply
from zfabric.core.names import Names
from zfabric.core.queueing import FairQueue
from zfabric.core.request_state import RequestState
from zfabric.core.timers import Timer
from zfabric.ids import RoutingId
from zfabric.limits import FORMER_ATTEMPTS_MAX
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import ClientHello, ModelInfo, Operation, WorkerHello

#: An attempt: its client's instance, the request's number, the attempt's number.
Key = tuple[int, int, int]


class WorkerState(IntEnum):
    """Where a worker stands."""

    READY = 1
    DRAINING = 2
    GONE = 3


class Former(NamedTuple):
    """An attempt that ended through no fault of its client's: the next one keeps its place in the line, at the same model."""

    attempt: int
    arrival: int
    model: str
    lost_ns: int


class ClientPeer:
    """One client, over all of its connections that follow each other closely enough.

    Attributes:
        number: Of its session; each connection has another.
        lock: What its secret hashes to.
        away: Its connection was lost, and CLAIM_MS have not passed since.
        settle: When what it has not claimed is stopped.
        requests: What has not had its terminal, by number.
        former: Requests whose last attempt a worker's loss ended, and which may be submitted again; the newest ones only.
    """

    __slots__ = (
        "away", "former", "grant", "heard_ns", "instance", "label", "lock", "number", "requests", "routing_id", "settle",
        "since_ns", "token",
    )  # fmt: skip

    def __init__(
        self, number: int, hello: ClientHello, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        self.instance = hello.instance
        self.requests: dict[int, Request] = {}
        self.former: OrderedDict[int, Former] = OrderedDict()
        self.settle: Timer | None = None
        self.since_ns = now_ns
        self.open_session(number, hello, token, routing_id, grant, now_ns)

    def open_session(
        self, number: int, hello: ClientHello, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        """Its HELLO was accepted on a new connection."""
        self.number = number
        self.grant = grant
        self.token = token
        self.routing_id = routing_id
        self.label = hello.label
        self.lock = lock_of(hello.secret)
        self.heard_ns = now_ns
        self.away = False

    def remember(self, request: Request, now_ns: int) -> None:
        """An attempt ends, and another is to follow."""
        if request.model is not None:
            self.former[request.request] = Former(request.attempt, request.arrival, request.model.name, now_ns)
            self.former.move_to_end(request.request)
            if len(self.former) > FORMER_ATTEMPTS_MAX:
                self.former.popitem(last=False)

    def coming_back(self, since_ns: int) -> bool:
        """Whether a request was lost since then, and its next attempt has not come."""
        return bool(self.former) and next(reversed(self.former.values())).lost_ns > since_ns


class Engine:
    """One engine of a worker: what it reported, and the live requests that it works on."""

    __slots__ = ("live", "moved_ns", "progress")

    def __init__(self, now_ns: int) -> None:
        self.live: set[Key] = set()
        self.progress: int | None = None
        self.moved_ns = now_ns


class WorkerPeer:
    """One worker session.

    `live` holds every attempt in the worker's hands, by (client instance, request, attempt): its size is the load. Those
    `aside` need no slot: operators' calls, and finished answers that wait for their reader. `hung` are those of its
    `engines` that have work and have not moved for too long. `filled` counts requests that it got from queues.
    """

    __slots__ = (
        "aside", "beats", "dispatched", "engines", "failed", "filled", "finished", "heard_ns", "hosts", "hung", "instance",
        "lease", "line", "live", "load", "name", "open", "routes", "routing_id", "session", "since_ns", "speed", "state", "token",
    )  # fmt: skip

    def __init__(self, hello: WorkerHello, session: int, token: bytes, routing_id: RoutingId, now_ns: int) -> None:
        self.name = hello.name
        self.instance = hello.instance
        self.speed = hello.speed
        self.beats = hello.beats
        self.session = session
        self.token = token
        self.routing_id = routing_id
        self.state = WorkerState.DRAINING if hello.load.draining else WorkerState.READY
        self.load = hello.load
        self.hosts: dict[str, Hosting] = {}
        self.live: dict[Key, Request] = {}
        self.line = Line()
        #: Whether it had a free slot when its candidacies were last brought up to date.
        self.open = False
        self.aside: set[Key] = set()
        self.engines: dict[int, Engine] = {}
        self.hung: list[Engine] = []
        self.routes: dict[int, int] = {}
        self.dispatched = self.filled = self.finished = self.failed = 0
        self.since_ns = self.heard_ns = now_ns
        self.lease: Timer | None = None

    @property
    def in_flight(self) -> int:
        """Attempts that hold a slot."""
        return len(self.live) - len(self.aside)

    @property
    def taking(self) -> bool:
        """Whether it takes requests at all, now or when others have ended."""
        return self.state is WorkerState.READY and self.load.slots > 0

    @property
    def free(self) -> int:
        """Slots that a new request may take. What a hung engine holds is no load for the worker's other engines."""
        if self.state is not WorkerState.READY:
            return 0
        free = self.load.slots - self.in_flight
        return free + sum([len(engine.live) for engine in self.hung]) if self.hung else free

    def engine(self, index: int) -> Engine:
        """The engine of an index, made if unknown."""
        found = self.engines.get(index)
        if found is None:
            found = self.engines[index] = Engine(self.heard_ns)
        return found


class Request:
    """One attempt of a request. The body is dropped as soon as a worker has it.

    Attributes:
        client: Who waits for it; None once nobody does, or not yet.
        lock: Of its client: whoever claims it has to have the same.
        away: Its client has lost the connection and not claimed it since.
        engine: Where it runs.
        asked: The name that was asked for: the model's, or an alias of it.
        arrival: Where it stands among all requests by their first arrival; a later attempt has that of the former.
    """

    __slots__ = (
        "arrival", "asked", "attempt", "away", "body", "client", "deadline", "deadline_ns", "demand", "dispatched_ns", "engine",
        "host", "instance", "lock", "model", "operation", "owner", "priority", "request", "resume_from", "size", "state",
        "window", "worker",
    )  # fmt: skip

    def __init__(
        self,
        client: ClientPeer | None,
        *,
        instance: int,
        request: int,
        attempt: int,
        operation: Operation,
        state: RequestState,
        priority: int = 0,
        window: int = 0,
        resume_from: int = 0,
        asked: str = "",
        arrival: int = 0,
    ) -> None:
        self.client = client
        self.owner = instance
        self.lock = client.lock if client is not None else b""
        self.away = False
        self.instance = instance
        self.request = request
        self.attempt = attempt
        self.operation = operation
        self.state = state
        self.priority = priority
        self.window = window
        self.resume_from = resume_from
        self.asked = asked
        self.arrival = arrival
        self.demand = Demand(operation, resume_from > 0)
        self.model: Model | None = None
        self.worker: WorkerPeer | None = None
        self.host: Hosting | None = None
        self.engine: Engine | None = None
        self.body: bytes | None = None
        self.size = 0
        self.deadline: Timer | None = None
        self.deadline_ns: int | None = None
        self.dispatched_ns = 0

    @property
    def key(self) -> Key:
        """Its name in `live`."""
        return (self.instance, self.request, self.attempt)


class Registry:
    """Clients by instance, workers by name, models by all their names. Keeps supplies in step with hosts and free slots.

    Attributes:
        live: Every attempt in a worker's hands.
        changed: Models that gained or lost a host, or a host that takes requests: see `Queues.settle`.
        held: Names that a hosted model has now, and had not before.
    """

    __slots__ = ("_aliases", "_names", "_rng", "_turns", "changed", "clients", "held", "live", "models", "workers")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names: Names[Model] = Names()
        self._aliases = itertools.count(1)
        self._turns = itertools.count(1)
        self.clients: dict[int, ClientPeer] = {}
        self.workers: dict[str, WorkerPeer] = {}
        self.models: dict[str, Model] = {}
        self.live: dict[Key, Request] = {}
        self.changed: dict[Model, None] = {}
        self.held: dict[str, None] = {}

    # ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, name: str) -> Model | None:
        """The model that a name stands for now, see `names`."""
        return self._names.find(name)

    def model(self, name: str) -> Model:
        """The model of a name, made if unknown."""
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = Model(name, FairQueue(self._turns))
            self._names.put(name, found, held=False)
        return found

    def supply(self, model: Model, demand: Demand) -> Supply:
        """Who can serve a demand of a model."""
        found = model.supplies.get(demand)
        if found is None:
            found = model.supplies[demand] = Supply()
        return found

    def candidates(self, supply: Supply) -> Candidates:
        """Who can take a request of a supply now."""
        return supply.ask(self._rng)

    def forget(self, model: Model) -> None:
        """Remove a model that nobody hosts."""
        self.models.pop(model.name, None)
        self.changed.pop(model, None)
        for name in (model.name, *model.aliases):
            self._names.discard(name, model)

    def sweep_aliases(self, model: Model) -> bool:
        """Take away aliases that nobody has announced since the last look. Returns whether another look is needed."""
        again = False
        for name in list(model.unheld):
            alias = model.aliases[name]
            if alias.stale:
                self._forget_alias(model, name)
            else:
                alias.stale = again = True
        return again

    def _forget_alias(self, model: Model, name: str) -> None:
        del model.aliases[name]
        model.unheld.pop(name, None)
        self._names.discard(name, model)

    def _announce_aliases(self, hosting: Hosting, former: list[str], aliases: list[str]) -> None:
        """Set a host's aliases. One that it drops on purpose, and nobody else announces, is gone at once."""
        model = hosting.model
        for name in former:
            alias = model.aliases.get(name)
            if alias is not None and name not in aliases:
                alias.holders.pop(hosting.name, None)
                if not alias.holders:
                    self._forget_alias(model, name)
        for name in aliases:
            if name == model.name:
                continue
            alias = model.aliases.get(name)
            if alias is None:
                alias = model.aliases[name] = Alias(next(self._aliases))
            if not alias.holders:
                model.unheld.pop(name, None)
                alias.stale = False
                self._hold(name, model, alias.order)
            alias.holders[hosting.name] = None

    def _hold(self, name: str, model: Model, order: int = 0) -> None:
        self._names.put(name, model, held=True, order=order)
        self.held[name] = None

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def announce(self, worker: WorkerPeer, infos: list[ModelInfo]) -> None:
        """Set the models of a worker. What runs there goes on, also of a model that it serves no more."""
        names = {info.name for info in infos}
        for name in [name for name in worker.hosts if name not in names]:
            self.withdraw(worker, name, lost=False)
        self.workers[worker.name] = worker
        gained = False
        for info in infos:
            hosting = worker.hosts.get(info.name)
            if hosting is None:
                gained = True
                hosting = self._host(worker, info)
                self._announce_aliases(hosting, [], info.aliases)
            else:
                former, before = hosting.info.aliases, hosting.demands
                hosting.announced(info)
                self._announce_aliases(hosting, former, info.aliases)
                for demand in before:
                    if demand not in hosting.demands:
                        hosting.model.supplies[demand].discard(hosting, lost=False)
            for demand in hosting.demands:
                self.supply(hosting.model, demand).put(hosting)
            self.changed[hosting.model] = None
        if gained:
            self._rebind(worker)
        self.refresh(worker)

    def withdraw(self, worker: WorkerPeer, name: str, *, lost: bool = True) -> None:
        """Take one model away from a worker, which was lost, or serves it no more."""
        hosting = worker.hosts.pop(name)
        model = hosting.model
        for demand in hosting.demands:
            model.supplies[demand].discard(hosting, lost=lost)
        del model.hosts[worker.name]
        if not model.hosts:
            self._names.put(model.name, model, held=False)
        for alias_name in hosting.info.aliases:
            alias = model.aliases.get(alias_name)
            if alias is not None and worker.name in alias.holders:
                del alias.holders[worker.name]
                if not alias.holders:
                    model.unheld[alias_name] = None
                    self._names.put(alias_name, model, held=False, order=alias.order)
        self.changed[model] = None

    def _host(self, worker: WorkerPeer, info: ModelInfo) -> Hosting:
        """A worker serves a model that it did not serve before."""
        model = self.model(info.name)
        hosting = Hosting(worker, model, info)
        if not model.hosts:
            self._hold(model.name, model)
        worker.hosts[model.name] = model.hosts[worker.name] = hosting
        return hosting

    def _rebind(self, worker: WorkerPeer) -> None:
        """Count what a worker still runs of a model that it serves again."""
        for request in worker.live.values():
            hosting = worker.hosts.get(request.model.name) if request.model is not None else None
            if hosting is not None and request.host is not hosting and request.key not in worker.aside:
                request.host = hosting
                hosting.live.add(request.key)

    # ── what runs where ─────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self, worker: WorkerPeer) -> None:
        """Bring everything that depends on a worker's load and state up to date."""
        for hosting in worker.hosts.values():
            taking = hosting.taking
            if taking is not hosting.taken:
                hosting.taken = taking
                self.changed[hosting.model] = None
                for demand in hosting.demands:
                    hosting.model.supplies[demand].put(hosting)
        self._fit(worker)

    def moved(self, worker: WorkerPeer, host: Hosting | None) -> None:
        """One request came to a worker or left it, of `host`'s model. The other models are looked at only where it
        matters to them: when the worker became full or free, and where candidates are kept in order."""
        if (worker.free > 0) is not worker.open:
            self._fit(worker)
            return
        worker.line.length = worker.in_flight
        if len(self.workers) <= CANDIDATES_UNORDERED_MAX:
            return
        # A request may outlive its model at this worker.
        if host is not None and worker.hosts.get(host.model.name) is host:
            host.refresh(self._rng)
        if len(worker.hosts) > 1:
            for other in worker.hosts.values():
                if other is not host:
                    for candidates in other.kept:
                        candidates.changed(other, self._rng)

    def _fit(self, worker: WorkerPeer) -> None:
        """Bring the candidacies of all models of a worker up to date."""
        worker.line.length = worker.in_flight
        worker.open = worker.free > 0
        if len(self.workers) > CANDIDATES_UNORDERED_MAX:
            for hosting in worker.hosts.values():
                hosting.refresh(self._rng)
