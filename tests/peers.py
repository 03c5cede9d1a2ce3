"""A broker whose clients and workers are made of messages alone: every step is a call, and time is a number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.peers import Request
from zfabric.core.controller.scaling import Rule
from zfabric.errors import BY_CODE, FabricError
from zfabric.ids import RoutingId, milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.fields import Operation
from zfabric.wire.flow import Cancel
from zfabric.wire.load import CachedBlocks, Load
from zfabric.wire.messages import ClientHello, Dispatch, End, Ends, Goodbye, ModelInfo, Submit, WorkerHello
from zfabric.wire.payloads import OperateRequest
from zfabric.wire.questions import Query

ALL = ("generate", "embed", "count_tokens", "resume")


class Terminal(NamedTuple):
    """How an attempt ended for its client; `error` is None where it is done."""

    request: int
    attempt: int
    error: type[FabricError] | None
    details: dict[str, Any]


def model(name: str = "m", *capabilities: str, aliases: Sequence[str] = (), slots: int = 0) -> ModelInfo:
    """A model as it is announced: by default one that can do everything."""
    return ModelInfo(name=name, capabilities=list(capabilities or ALL), aliases=list(aliases), slots=slots)


class FakeFabric:
    """A broker and its peers. What it sends is sorted into `dispatches`, `terminals`, `refusals` and `faults` at once."""

    def __init__(self, **settings: Any) -> None:
        self.now_ns = 1_000_000_000
        self.broker = Broker(BrokerConfig(**{"recovery_ms": 0, **settings}), random.Random(7), self.now_ns)
        self.dispatches: dict[str, list[Dispatch]] = {}
        #: Calls of the controller's own: by worker and request, what is called and the adapter's name.
        self.calls: dict[tuple[str, int], tuple[str, str]] = {}
        self.terminals: dict[str, list[Terminal]] = {}
        self.refusals: list[type[FabricError]] = []
        self.faults: list[type[FabricError]] = []
        self.answers: list[Any] = []
        #: What each peer was sent of other kinds, by name.
        self.sent: dict[str, list[Any]] = {}
        self.instances: dict[str, int] = {}
        self._tokens: dict[str, bytes] = {}
        self._connections: dict[str, int] = {}

    # ── peers ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def client(self, name: str, label: str = "") -> str:
        """A client says HELLO."""
        self._connect(name)
        hello = ClientHello(
            version=kinds.PROTOCOL_VERSION, build="", instance=self.instances[name], label=label, secret=name.encode()
        )
        self._receive(name, codec.pack(hello))
        return name

    def worker(
        self,
        name: str,
        *models: ModelInfo,
        slots: int = 1,
        speed: float = 1.0,
        draining: bool = False,
        again: bool = False,
        minor: int = kinds.MINOR_VERSION,
    ) -> str:
        """A worker says HELLO; `again` on the session that it has."""
        if not again:
            self._connect(name)
            self.dispatches[name] = []
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            name=name,
            instance=self.instances[name],
            models=list(models),
            load=Load(slots=slots, draining=draining),
            speed=speed,
            minor=minor,
        )
        self._receive(name, codec.pack(hello))
        return name

    def lose(self, name: str) -> None:
        """A connection is gone."""
        self.broker.disconnected(self._id(name), self.now_ns)
        self._sort()

    def leave(self, name: str) -> None:
        """A peer says GOODBYE."""
        self._receive(name, codec.pack(Goodbye("")))

    def load(self, name: str, *, slots: int = 1, draining: bool = False, progress: int = 0) -> None:
        """A worker reports."""
        self._receive(name, codec.pack(Load(slots=slots, draining=draining, progress=progress)))

    def tell(self, name: str, *cached: CachedBlocks, slots: int = 1) -> None:
        """A worker tells what its engines have cached."""
        self._receive(name, codec.pack(Load(slots=slots, cached=list(cached))))

    def pass_ms(self, duration_ms: float, *alive: str) -> None:
        """Let time pass; the workers named are heard of all the while."""
        until_ns = self.now_ns + milliseconds(duration_ms)
        while self.now_ns < until_ns:
            due_ns = self.broker.next_deadline_ns()
            step_ns = self.now_ns + milliseconds(500)
            self.now_ns = min(until_ns, step_ns if due_ns is None else max(self.now_ns, min(step_ns, due_ns)))
            for name in alive:
                self.broker.registry.workers[name].heard_ns = self.now_ns
            self.broker.tick(self.now_ns)
            self._sort()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        client: str,
        request: int,
        operation: Operation = "generate",
        *,
        model: str = "m",
        body: bytes = b"\x80",
        **values: Any,
    ) -> None:
        """A client submits."""
        envelope = Submit(request=request, operation=operation, model=model, **{"attempt": 0, **values})
        self._receive(client, (codec.pack_envelope(envelope), body))

    def cancel(self, client: str, *requests: int) -> None:
        """A client cancels."""
        self._receive(client, codec.pack(Cancel(list(requests))))

    def end(self, worker: str, client: str, request: int, attempt: int = 0, code: int = 0) -> None:
        """A worker ends a request."""
        ends = Ends(instance=self.instances[client], ends=[End(request=request, attempt=attempt, code=code)])
        self._receive(worker, (codec.pack_envelope(ends), codec.encode(EndsBody(outcomes=[Outcome()]))))

    def end_all(self, worker: str) -> int:
        """A worker ends all that it was given. Returns how much that was."""
        taken, self.dispatches[worker] = self.dispatches[worker], []
        names = {instance: name for name, instance in self.instances.items()}
        for dispatch in taken:
            self.end(worker, names[dispatch.instance], dispatch.request, dispatch.attempt)
        return len(taken)

    def query(self, client: str, what: str, /, **arguments: Any) -> Any:
        """A client asks. Returns the result."""
        self._receive(client, codec.pack(Query(number=1, what=what, arguments=arguments)))
        return self.answers.pop()

    def scale(self, rules: list[Rule]) -> None:
        """An operator has these rules decide how many replicas models should have."""
        self.broker.scale(rules, self.now_ns)
        self._sort()

    # ── what became of it ───────────────────────────────────────────────────────────────────────────────────────────

    def taken(self, worker: str) -> list[int]:
        """The requests that a worker was given since it was last asked."""
        taken, self.dispatches[worker] = self.dispatches[worker], []
        return [dispatch.request for dispatch in taken]

    def ended(self, client: str) -> list[tuple[int, type[FabricError] | None]]:
        """The terminals that a client got since it was last asked."""
        return [(terminal.request, terminal.error) for terminal in self.terminals.pop(client, [])]

    def waiting(self) -> list[Request]:
        """All that waits in queues."""
        return [request for known in self.broker.registry.models.values() for request in known.queue.items()]

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self, name: str) -> None:
        self.instances.setdefault(name, len(self.instances) + 1)
        self._connections[name] = self._connections.get(name, 0) + 1

    def _id(self, name: str) -> RoutingId:
        return RoutingId(f"{name}/{self._connections[name]}".encode())

    def _receive(self, name: str, frames: tuple[bytes, bytes]) -> None:
        self.broker.receive(self._id(name), *frames, self.now_ns)
        self._sort()

    def _sort(self) -> None:
        for to, header, body in self.broker.outbox.take():
            name, kind = to.decode().partition("/")[0], header[0]
            if kind == kinds.DISPATCH:
                dispatch = codec.unpack_envelope(header)
                self.dispatches[name].append(dispatch)
                if not dispatch.client:
                    call = codec.unpack_request("operate", body)
                    assert isinstance(call, OperateRequest)
                    self.calls[name, dispatch.request] = (call.call, call.arguments["name"])
            elif kind == kinds.ENDS:
                self._terminals(name, codec.unpack_envelope(header), codec.unpack_ends_body(body))
            elif kind in (kinds.REFUSED, kinds.FAULT):
                found = self.refusals if kind == kinds.REFUSED else self.faults
                found.append(BY_CODE[codec.unpack_control(header).code])
            elif kind == kinds.ANSWER:
                answer = codec.unpack_control(header)
                self.answers.append(codec.unpack_result(answer.result, object) if not answer.code else answer)
            else:
                self.sent.setdefault(name, []).append(codec.unpack_control(header) if len(header) > 1 else None)

    def _terminals(self, client: str, envelope: Ends, body: EndsBody) -> None:
        for end, outcome in zip(envelope.ends, body.outcomes, strict=True):
            error = BY_CODE[end.code] if end.code else None
            self.terminals.setdefault(client, []).append(
                Terminal(end.request, end.attempt, error, dict(outcome.details))
            )
