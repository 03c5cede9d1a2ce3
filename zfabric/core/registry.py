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
from zfabric.wire.messages import ClientHello, ModelInfo, Operation, WorkerHello


class WorkerState(IntEnum):
    """Where a worker stands. STALLED is registered and beating, but its engine has not moved for too long."""

    READY = 1
    DRAINING = 2
    STALLED = 3
    GONE = 4


class ClientPeer:
    """One client session."""

    __slots__ = ("grant", "heard_ns", "instance", "label", "number", "requests", "routing_id", "since_ns", "token")

    def __init__(
        self, number: int, hello: ClientHello, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        self.number = number
        self.instance = hello.instance
        self.grant = grant
        self.token = token
        self.routing_id = routing_id
        self.label = hello.label
        self.requests: dict[int, Request] = {}
        self.since_ns = now_ns
        self.heard_ns = now_ns


class WorkerPeer:
    """One worker session.

    `live` holds every attempt in the worker's hands, by (client instance, request, attempt): its size is the load. `slotless` of
    them need no slot: operators' calls, and finished answers that wait for their reader.
    """

    __slots__ = (
        "beats", "dispatched", "failed", "finished", "heard_ns", "hosts", "instance", "lease", "line", "live", "load",
        "moved_ns", "name", "open", "routes", "routing_id", "session", "since_ns", "slotless", "speed", "state", "token",
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
        self.slotless = 0
        self.routes: dict[int, int] = {}
        self.dispatched = self.finished = self.failed = 0
        self.since_ns = self.heard_ns = self.moved_ns = now_ns
        self.lease: Timer | None = None

    @property
    def in_flight(self) -> int:
        """Attempts that hold a slot."""
        return len(self.live) - self.slotless

    @property
    def free(self) -> int:
        """Slots that a new request may take."""
        return self.load.slots - self.in_flight if self.state is WorkerState.READY else 0


class Hosting(Host):
    """A model at a worker, with both ends."""

    __slots__ = ("info", "model", "resumes", "worker")

    def __init__(self, worker: WorkerPeer, model: Model, info: ModelInfo) -> None:
        super().__init__(worker.name, worker.speed, info.slots, worker.line)
        self.worker = worker
        self.model = model
        self.info = info
        self.resumes = "resume" in info.capabilities

    @property
    def open(self) -> bool:
        """Whether a request of the model may go to the worker now."""
        return self.worker.free > 0 and (not self.slots or self.in_flight < self.slots)


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
    """One attempt of a request. The body is dropped as soon as a worker has it."""

    __slots__ = (
        "attempt", "body", "client", "deadline", "deadline_ns", "dispatched_ns", "host", "instance", "model", "operation",
        "owner", "priority", "request", "resume_from", "size", "slotless", "state", "window", "worker",
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
        self.owner = client.number if client else 0
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
        self.body: bytes | None = None
        self.size = 0
        self.deadline: Timer | None = None
        self.deadline_ns: int | None = None
        self.dispatched_ns = 0
        self.slotless = False

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
                known.info, known.slots, known.resumes = info, info.slots, "resume" in info.capabilities
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
