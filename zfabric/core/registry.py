"""Who is there: clients, workers, models, and which worker hosts which model."""

from __future__ import annotations

import random
from enum import IntEnum

from zfabric.core.access import Grant
from zfabric.core.dispatch import Candidates, Host, Line
from zfabric.core.queueing import FairQueue
from zfabric.core.request_state import RequestState
from zfabric.core.timers import Timer
from zfabric.ids import RoutingId
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import ClientHello, ModelInfo, Operation, WorkerHello


class WorkerState(IntEnum):
    """Where a worker stands."""

    READY = 1
    DRAINING = 2
    GONE = 3


class ClientPeer:
    """One client, over all of its connections that follow each other closely enough.

    Attributes:
        number: Of its session; each connection has another.
        lock: What its secret hashes to.
        away: Its connection was lost, and CLAIM_MS have not passed since.
        settle: When what it has not claimed is stopped.
    """

    __slots__ = (
        "away", "grant", "heard_ns", "instance", "label", "lock", "number", "requests", "routing_id", "settle", "since_ns",
        "token",
    )  # fmt: skip

    def __init__(
        self, number: int, hello: ClientHello, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        self.instance = hello.instance
        self.requests: dict[int, Request] = {}
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


class Engine:
    """One engine of a worker: what it reported, and the live requests that it works on."""

    __slots__ = ("live", "moved_ns", "progress")

    def __init__(self, now_ns: int) -> None:
        self.live: set[tuple[int, int, int]] = set()
        self.progress: int | None = None
        self.moved_ns = now_ns


class WorkerPeer:
    """One worker session.

    `live` holds every attempt in the worker's hands, by (client instance, request, attempt): its size is the load. Those
    `aside` need no slot: operators' calls, and finished answers that wait for their reader. `hung` are those of its
    `engines` that have work and have not moved for too long.
    """

    __slots__ = (
        "aside", "beats", "dispatched", "engines", "failed", "finished", "heard_ns", "hosts", "hung", "instance", "lease",
        "line", "live", "load", "name", "open", "routes", "routing_id", "session", "since_ns", "speed", "state", "token",
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
        self.live: dict[tuple[int, int, int], Request] = {}
        self.line = Line()
        #: Whether it had a free slot when its candidacies were last brought up to date.
        self.open = False
        self.aside: set[tuple[int, int, int]] = set()
        self.engines: dict[int, Engine] = {}
        self.hung: list[Engine] = []
        self.routes: dict[int, int] = {}
        self.dispatched = self.finished = self.failed = 0
        self.since_ns = self.heard_ns = now_ns
        self.lease: Timer | None = None

    @property
    def in_flight(self) -> int:
        """Attempts that hold a slot."""
        return len(self.live) - len(self.aside)

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


class Hosting(Host):
    """A model at a worker, with both ends."""

    __slots__ = ("engine", "info", "model", "resumes", "worker")

    def __init__(self, worker: WorkerPeer, model: Model, info: ModelInfo) -> None:
        super().__init__(worker.name, worker.speed, info.slots, worker.line)
        self.worker = worker
        self.model = model
        self.announced(info)

    def announced(self, info: ModelInfo) -> None:
        """What the worker says of the model, at first and again later."""
        self.info, self.slots, self.resumes = info, info.slots, "resume" in info.capabilities
        self.engine = self.worker.engine(info.engine)

    @property
    def open(self) -> bool:
        """Whether a request of the model may go to the worker now."""
        if self.engine in self.worker.hung or (self.slots and self.in_flight >= self.slots):
            return False
        return self.worker.free > 0


class Model:
    """A model some worker hosts or lately hosted, and the requests that wait for it."""

    __slots__ = ("aliases", "candidates", "forget", "hosts", "name", "queue")

    def __init__(self, name: str) -> None:
        self.name = name
        self.hosts: dict[str, Hosting] = {}
        self.candidates = Candidates()
        self.queue: FairQueue[Request] = FairQueue()
        self.forget: Timer | None = None

    def supports(self, operation: Operation) -> bool:
        """Whether any host offers the operation."""
        return any(operation in hosting.info.capabilities for hosting in self.hosts.values())


class Request:
    """One attempt of a request. The body is dropped as soon as a worker has it.

    Attributes:
        client: Who waits for it; None once nobody does, or not yet.
        lock: Of its client: whoever claims it has to have the same.
        away: Its client has lost the connection and not claimed it since.
        engine: Where it runs.
    """

    __slots__ = (
        "attempt", "away", "body", "client", "deadline", "deadline_ns", "dispatched_ns", "engine", "host", "instance",
        "lock", "model", "operation", "owner", "priority", "request", "resume_from", "size", "state", "window", "worker",
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
    def key(self) -> tuple[int, int, int]:
        """Its place in its worker's `live`."""
        return (self.instance, self.request, self.attempt)


class Registry:
    """Clients by instance, workers by name, models by name and alias. Keeps candidates in step with free slots."""

    __slots__ = ("_rng", "aliases", "clients", "models", "workers")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.clients: dict[int, ClientPeer] = {}
        self.workers: dict[str, WorkerPeer] = {}
        self.models: dict[str, Model] = {}
        self.aliases: dict[str, str] = {}

    def find(self, name: str) -> Model | None:
        """The model of a name or an alias. Where one worker's name is another's alias, the name goes first while anybody
        hosts it."""
        model = self.models.get(name)
        if model is not None and model.hosts:
            return model
        other = self.models.get(self.aliases.get(name, ""))
        return other if other is not None and (other.hosts or model is None) else model

    def model(self, name: str) -> Model:
        """The model of a name, made if unknown."""
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = Model(name)
        return found

    def announce(self, worker: WorkerPeer, infos: list[ModelInfo]) -> list[Model]:
        """Set the models of a worker. Returns the models it no longer hosts."""
        names = {info.name for info in infos}
        dropped = [self.withdraw(worker, name) for name in list(worker.hosts) if name not in names]
        for info in infos:
            model = self.model(info.name)
            known = worker.hosts.get(info.name)
            if known is not None:
                known.announced(info)
            else:
                hosting = Hosting(worker, model, info)
                worker.hosts[info.name] = model.hosts[worker.name] = hosting
            for alias in info.aliases:
                self.aliases.setdefault(alias, info.name)
        self.workers[worker.name] = worker
        self.refresh(worker)
        return dropped

    def withdraw(self, worker: WorkerPeer, name: str) -> Model:
        """Take one model away from a worker."""
        hosting = worker.hosts.pop(name)
        hosting.model.candidates.remove(hosting)
        del hosting.model.hosts[worker.name]
        return hosting.model

    def forget(self, model: Model) -> None:
        """Remove a model that nobody hosts."""
        self.models.pop(model.name, None)
        for alias in [alias for alias, name in self.aliases.items() if name == model.name]:
            del self.aliases[alias]

    def refresh(self, worker: WorkerPeer) -> None:
        """Bring the candidacies of all models of a worker up to date with its load and state."""
        worker.line.length = worker.in_flight
        worker.open = worker.free > 0
        for hosting in worker.hosts.values():
            self._refresh_one(hosting)

    def moved(self, worker: WorkerPeer, host: Hosting | None) -> None:
        """One request came to a worker or left it, of `host`'s model. The other models are looked at only where it
        matters to them: when the worker became full or free, and where their candidates are kept in order."""
        if (worker.free > 0) is not worker.open:
            self.refresh(worker)
            return
        worker.line.length = worker.in_flight
        # A request may outlive its model at this worker.
        if host is not None and worker.hosts.get(host.model.name) is host:
            self._refresh_one(host)
        if len(worker.hosts) > 1:
            for other in worker.hosts.values():
                if other is not host and other.model.candidates.ordered:
                    other.model.candidates.changed(other, self._rng)

    def _refresh_one(self, hosting: Hosting) -> None:
        if hosting.open:
            hosting.model.candidates.add(hosting, self._rng)
        else:
            hosting.model.candidates.remove(hosting)
