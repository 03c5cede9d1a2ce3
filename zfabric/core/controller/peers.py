"""Who takes part: a client, a worker, one of its engines, and a request on its way from one to the other."""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum
from typing import ClassVar, NamedTuple

from zfabric.core.controller.access import Grant
from zfabric.core.controller.candidates import Line
from zfabric.core.controller.hosting import Hosting, Model, demand_of
from zfabric.core.controller.quotas import Account
from zfabric.core.controller.request_state import RequestState
from zfabric.core.controller.spans import AttemptSpan
from zfabric.core.timers import Timer
from zfabric.errors import FabricError
from zfabric.ids import RoutingId
from zfabric.limits import FORMER_ATTEMPTS_MAX, SEARCHES_MAX
from zfabric.wire.fields import Operation
from zfabric.wire.kinds import MINOR_VERSION
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import ClientHello, WorkerHello

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
        stopped: Requests that an operator has ended while it was away, and what it is told when it claims them.
        build, minor: Of its program, and the minor version of the protocol that is spoken with it.
        newer: Whether it speaks a later minor version than this controller.
        remote: Whether it is a client of another controller, whose cell this one is (`zfabric.core.cell`).
    """

    remote: ClassVar[bool] = False

    __slots__ = (
        "away", "build", "former", "grant", "heard_ns", "instance", "label", "lock", "minor", "newer", "number", "requests",
        "routing_id", "searches", "settle", "since_ns", "stopped", "token",
    )  # fmt: skip

    def __init__(
        self, number: int, hello: ClientHello, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        self.instance = hello.instance
        self.requests: dict[int, Request] = {}
        self.former: OrderedDict[int, Former] = OrderedDict()
        self.stopped: dict[int, FabricError] = {}
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
        self.build, self.minor = hello.build, min(hello.minor, MINOR_VERSION)
        self.newer = hello.minor > MINOR_VERSION
        self.lock = lock_of(hello.secret)
        #: Requests that all workers were asked for in this session.
        self.searches = 0
        self.heard_ns = now_ns
        self.away = False

    @property
    def name(self) -> str:
        """Its label, or its number where it has none."""
        return self.label or str(self.number)

    @property
    def shown(self) -> str:
        """What operators know it by."""
        return f"client {self.name}"

    def remember(self, request: Request, now_ns: int) -> None:
        """An attempt ends, and another is to follow."""
        if request.model is not None:
            self.former[request.request] = Former(request.attempt, request.arrival, request.model.name, now_ns)
            self.former.move_to_end(request.request)
            if len(self.former) > FORMER_ATTEMPTS_MAX:
                self.former.popitem(last=False)

    def may_search(self) -> bool:
        """Whether all workers may be asked for one more of its requests: not for as many as it likes."""
        self.searches += 1
        return self.searches <= SEARCHES_MAX

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
    `engines` that have work and have not moved for too long. `filled` counts requests that it got from queues. `leaves_for` is
    the operator who has told it to leave, "" if nobody has in this session. `cells` and `depth` are what a cell said in its
    HELLO.
    """

    __slots__ = (
        "announced_speed", "aside", "beats", "build", "cells", "depth", "dispatched", "engines", "failed", "filled", "finished",
        "grant", "heard_ns", "hosts", "hung", "instance", "lease", "leaves_for", "line", "live", "load", "minor",
        "name", "newer", "open", "reported_ns", "routes", "routing_id", "session", "since_ns", "speed", "state", "token",
    )  # fmt: skip

    def __init__(
        self, hello: WorkerHello, session: int, token: bytes, routing_id: RoutingId, grant: Grant, now_ns: int
    ) -> None:
        self.name = hello.name
        self.grant = grant
        self.instance = hello.instance
        self.speed = hello.speed
        self.leaves_for = ""
        self.beats = hello.beats
        self.announced(hello)
        self.build, self.minor = hello.build, min(hello.minor, MINOR_VERSION)
        self.newer = hello.minor > MINOR_VERSION
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
        self.reported_ns = 0
        self.lease: Timer | None = None

    def announced(self, hello: WorkerHello) -> None:
        """What it says of itself, at first and again later."""
        self.announced_speed = hello.speed
        self.cells, self.depth = hello.cells, hello.depth

    @property
    def shown(self) -> str:
        """What operators know it by."""
        return f"worker {self.name}"

    @property
    def in_flight(self) -> int:
        """Attempts that hold a slot."""
        return len(self.live) - len(self.aside)

    @property
    def length(self) -> int:
        """Attempts that hold a slot, of all controllers, as far as is known: what policies compare."""
        return len(self.live) - len(self.aside) + self.load.elsewhere

    @property
    def taking(self) -> bool:
        """Whether it takes requests at all, now or when others have ended."""
        return self.state is WorkerState.READY and self.load.slots > 0

    @property
    def free(self) -> int:
        """Slots that a new request may take. What a hung engine holds is no load for the worker's other engines."""
        if self.state is not WorkerState.READY:
            return 0
        free = self.load.slots - self.load.elsewhere - self.in_flight
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
        account: Whose limits it counts for; None where there are none.
        lock: Of its client: whoever claims it has to have the same.
        away: Its client has lost the connection and not claimed it since.
        engine: Where it runs.
        asked: The name that was asked for: the model's, or an alias of it.
        arrival: Where it stands among all requests by their first arrival; a later attempt has that of the former.
        units: Units of the answer that are known to be made, for operators.
        affinity, prefix, prefix_block: Of the SUBMIT, for policies.
        wanted: The one worker that will do, "" for any.
        traceparent, tracestate: Of the SUBMIT; passed on unread unless there is a `span`.
        span: What its trace is told; None for nothing.
    """

    __slots__ = (
        "accepted_ns", "account", "affinity", "arrival", "asked", "attempt", "away", "body", "client", "deadline", "deadline_ns",
        "demand", "dispatched_ns", "engine", "host", "instance", "key", "lock", "model", "operation", "owner", "prefix",
        "prefix_block", "priority", "request", "resume_from", "size", "span", "state", "traceparent", "tracestate", "units",
        "wanted", "window", "worker",
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
        #: Who takes turns: what shares limits shares them, else each client has turns of its own.
        self.owner: str | int = (client.grant.group if client is not None else "") or instance
        self.lock = client.lock if client is not None else b""
        self.away = False
        self.instance = instance
        self.request = request
        self.attempt = attempt
        #: Its name in `live`.
        self.key: Key = (instance, request, attempt)
        self.operation = operation
        self.state = state
        self.priority = priority
        self.window = window
        self.resume_from = self.units = resume_from
        self.asked = asked
        self.arrival = arrival
        self.demand = demand_of(operation, resume_from)
        self.model: Model | None = None
        self.account: Account | None = None
        self.worker: WorkerPeer | None = None
        self.host: Hosting | None = None
        self.engine: Engine | None = None
        self.body: bytes | None = None
        self.size = 0
        self.deadline: Timer | None = None
        self.deadline_ns: int | None = None
        self.accepted_ns = self.dispatched_ns = 0
        self.traceparent = self.tracestate = self.affinity = self.wanted = ""
        self.prefix = b""
        self.prefix_block = 0
        self.span: AttemptSpan | None = None
