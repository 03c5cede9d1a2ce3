"""A broker with fake peers: no clock, no sockets, no sessions of the real kinds. A test says what each peer sends."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple, TypeVar

from msgspec import Struct

from zfabric.core.controller.access import EVERYBODY, Grant
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer
from zfabric.ids import RoutingId
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, Outcome
from zfabric.wire.chunks import EndsBody, columns_of
from zfabric.wire.flow import Abort, Cancel
from zfabric.wire.flow import Grant as Granted
from zfabric.wire.load import Load
from zfabric.wire.messages import (
    Beat,
    Carried,
    CarriedMore,
    Claim,
    Claims,
    ClientHello,
    Dispatch,
    End,
    Ends,
    Goodbye,
    ModelInfo,
    Submit,
    Welcome,
    WorkerHello,
)
from zfabric.wire.questions import Answer, Fault, Query

T = TypeVar("T")
MILLISECOND = 1_000_000
CANCELLED = 49901
Key = tuple[int, int]


class Terminal(NamedTuple):
    """A terminal that a client got."""

    request: int
    attempt: int
    code: int
    message: str
    details: dict[str, Any]


class Peer:
    """One connection: what it sends, and what it got."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.id = bench.new_id()
        self.inbox: list[tuple[int, Any, bytes]] = []
        bench.peers[self.id] = self

    def send(self, message: Struct | bytes, body: bytes = b"") -> None:
        """Send a struct, or bytes as they are."""
        header = message if isinstance(message, bytes) else _header(message)
        self.bench.receive(self.id, header, body)

    def take(self, kind: type[T]) -> list[T]:
        """All messages of a kind since the last call."""
        found = [message for _, message, _ in self.inbox if isinstance(message, kind)]
        self.inbox = [entry for entry in self.inbox if not isinstance(entry[1], kind)]
        return found

    def kinds(self) -> list[str]:
        """The kinds of all messages that nobody took, in order."""
        return [kinds.NAMES[kind] for kind, _, _ in self.inbox]

    def cut(self) -> None:
        """The connection is lost, and the transport says so."""
        self.bench.peers.pop(self.id, None)
        self.bench.lost(self.id)

    def leave(self) -> None:
        """GOODBYE."""
        self.send(Goodbye("done"))

    @property
    def number(self) -> int:
        """Of its session, by the last WELCOME."""
        return self.welcome.session

    @property
    def welcome(self) -> Welcome:
        welcomes = [message for _, message, _ in self.inbox if isinstance(message, Welcome)]
        assert welcomes, f"not welcome: {self.inbox}"
        return welcomes[-1]

    @property
    def refusal(self) -> int | None:
        """The code by which it was refused."""
        refused = [message.code for kind, message, _ in self.inbox if kind == kinds.REFUSED]
        return refused[-1] if refused else None


class FakeClient(Peer):
    """Says what a test wants it to."""

    def hello(
        self, instance: int, *, secret: bytes = b"", token: bytes = b"", claims: list[Claim] | None = None
    ) -> FakeClient:
        self.instance, self.secret = instance, secret
        self.send(
            ClientHello(
                version=kinds.PROTOCOL_VERSION,
                build="",
                instance=instance,
                secret=secret,
                token=token,
                claims=list(claims or ()),
            )
        )
        return self

    def submit(self, request: int, attempt: int = 0, *, model: str = "m", body: bytes = b"x", **fields: Any) -> None:
        fields = {"operation": "generate", "window": 100, **fields}
        self.send(Submit(request=request, attempt=attempt, model=model, **fields), body)

    def claim(self, *lines: tuple[int, int, int]) -> None:
        """Claim (request, attempt, next) in a message of their own."""
        self.send(Claims([claim_of(*line) for line in lines]))

    def cancel(self, *requests: int) -> None:
        self.send(Cancel(list(requests)))

    def ask(self, what: str, **arguments: Any) -> list[Answer]:
        self.send(Query(number=7, what=what, arguments=arguments))
        return self.take(Answer)

    def back(self, *lines: tuple[int, int, int], secret: bytes | None = None, token: bytes = b"") -> FakeClient:
        """The same client on another connection, with claims."""
        again = FakeClient(self.bench)
        secret = self.secret if secret is None else secret
        return again.hello(self.instance, secret=secret, token=token, claims=[claim_of(*line) for line in lines])

    def terminals(self) -> list[Terminal]:
        """All terminals since the last call."""
        found: list[Terminal] = []
        for kind, message, body in self.inbox:
            if kind == kinds.ENDS:
                outcomes = codec.unpack_ends_body(body).outcomes
                assert len(outcomes) == len(message.ends)
                for end, outcome in zip(message.ends, outcomes, strict=True):
                    found.append(Terminal(end.request, end.attempt, end.code, outcome.message, outcome.details))
        self.inbox = [entry for entry in self.inbox if entry[0] != kinds.ENDS]
        return found

    def codes(self) -> dict[Key, int]:
        """Codes of all terminals since the last call, by attempt. The first one counts."""
        return {(end.request, end.attempt): end.code for end in reversed(self.terminals())}

    def texts(self) -> list[str]:
        """The text of all chunks since the last call, also of those that came with terminals."""
        found: list[str] = []
        for kind, message, body in self.inbox:
            chunks: list[Chunk] = []
            if kind == kinds.CHUNKS:
                chunks = message
            elif kind == kinds.ENDS:
                chunks = codec.unpack_ends_body(body).chunks.rows()
            found += [chunk.text for chunk in chunks]
        self.inbox = [entry for entry in self.inbox if entry[0] != kinds.CHUNKS]
        return found


class FakeWorker(Peer):
    """Says what a test wants it to, and confirms every ABORT at once unless it is `slow`."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.slow = False

    def hello(
        self,
        name: str = "w",
        *,
        instance: int = 1,
        models: list[ModelInfo] | None = None,
        slots: int = 4,
        token: bytes = b"",
        carried: list[Carried] | None = None,
        **fields: Any,
    ) -> FakeWorker:
        self.name, self.instance = name, instance
        self.models = models or [model_of("m")]
        # Nobody is held to a lease that a test does not mean.
        fields = {"load": Load(slots=slots), "beats": False, **fields}
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            name=name,
            instance=instance,
            models=self.models,
            token=token,
            carried=list(carried or ()),
            **fields,
        )
        self.send(hello)
        return self

    def back(self, *carried: Carried, token: bytes = b"", **fields: Any) -> FakeWorker:
        """The same worker on another connection."""
        again = FakeWorker(self.bench)
        fields = {"instance": self.instance, "models": self.models, **fields}
        return again.hello(self.name, token=token, carried=list(carried), **fields)

    def dispatched(self) -> list[Dispatch]:
        return self.take(Dispatch)

    def grants(self) -> list[tuple[int, int, int, bool, int]]:
        """(request, attempt, next, again, client's number) of all lines since the last call."""
        return [
            (line.request, line.attempt, line.next, line.again, grant.client)
            for grant in self.take(Granted)
            for line in grant.lines
        ]

    def aborted(self) -> list[Key]:
        """What it was told to stop since the last call."""
        return [(request, attempt) for abort in self.take(Abort) for request, attempt in abort.attempts]

    def end(
        self,
        instance: int,
        *attempts: Key,
        code: int = 0,
        client: int = 0,
        texts: list[tuple[int, int, str]] | None = None,
        units: int = 0,
    ) -> None:
        """End attempts, each after so many units, with chunks of any stream: (request, attempt, text)."""
        chunks = [Chunk(request, attempt, 0, 0, text, [1]) for request, attempt, text in texts or ()]
        ends = [End(request=request, attempt=attempt, code=code, units=units) for request, attempt in attempts]
        body = EndsBody(chunks=columns_of(chunks), outcomes=[Outcome() for _ in ends])
        envelope = Ends(instance=instance, ends=ends, client=client)
        self.send(codec.pack_envelope(envelope), codec.encode(body))

    def say(self, client: int, request: int, attempt: int, text: str) -> None:
        """One chunk, to the client session of this number."""
        self.send(codec.pack_chunks(client, [Chunk(request, attempt, 0, 0, text, [1])])[0])

    def load(self, *engines: int | None, **fields: Any) -> None:
        self.send(Load(**{"slots": 4, "engines": list(engines), **fields}))

    def carry(self, *lines: Carried) -> None:
        self.send(CarriedMore(list(lines)))


class Bench:
    """A broker, its time, and all connections to it.

    Args:
        config: Fields of `BrokerConfig`. There is no time after the start in which all may come back, unless one is given.
    """

    def __init__(self, **config: Any) -> None:
        self.now_ns = 1_000 * MILLISECOND
        self.peers: dict[RoutingId, Peer] = {}
        #: A look through all tables after each message, which a test of very many cannot afford.
        self.checking = True
        self._ids = 0
        self.grants: dict[RoutingId, Grant] = {}
        config = {"recovery_ms": 0, "lease_ms": 3_000, **config}
        self.broker = Broker(BrokerConfig(**config), random.Random(5), self.now_ns)
        self.broker.grant_of = lambda peer: self.grants.get(peer, EVERYBODY)

    def new_id(self) -> RoutingId:
        self._ids += 1
        return RoutingId(self._ids.to_bytes(5, "big"))

    def client(self, instance: int = 11, **fields: Any) -> FakeClient:
        return FakeClient(self).hello(instance, **fields)

    def key_holder(self, grant: Grant) -> FakeClient:
        """A client that has not said HELLO, with the key of a grant."""
        client = FakeClient(self)
        self.grants[client.id] = grant
        return client

    def worker(self, name: str = "w", **fields: Any) -> FakeWorker:
        return FakeWorker(self).hello(name, **fields)

    def receive(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        """What a driver does with a message."""
        if header[:1] == bytes([kinds.CHUNKS]):
            route = self.broker.routes.table.get(sender + header[: codec.ROUTE_BYTES])
            if route is not None:
                self.broker.outbox.pending.append((route.client, header, body))
                self._deliver()
                return
        self.broker.receive(sender, header, body, self.now_ns)
        self._deliver()

    def lost(self, peer: RoutingId) -> None:
        self.broker.disconnected(peer, self.now_ns)
        self._deliver()

    def sleep(self, milliseconds: float) -> None:
        """Let time pass, as a driver does that is never late."""
        until_ns = self.now_ns + int(milliseconds * MILLISECOND)
        while (due_ns := self.broker.next_deadline_ns()) is not None and due_ns <= until_ns:
            self.now_ns = max(self.now_ns, due_ns)
            self.broker.tick(self.now_ns)
            self._deliver()
        self.now_ns = until_ns

    def _deliver(self) -> None:
        while self.broker.outbox.pending:
            for to, header, body in self.broker.outbox.take():
                peer = self.peers.get(to)
                if peer is None:
                    self.broker.disconnected(to, self.now_ns)
                    continue
                assert len(header) <= 4 * 2**20
                assert len(body) <= 64 * 2**20
                assert (header[0] in kinds.WITH_BODY) or not body
                message = decoded(header)
                peer.inbox.append((header[0], message, body))
                if isinstance(message, Abort) and isinstance(peer, FakeWorker) and not peer.slow:
                    for request, attempt in message.attempts:
                        peer.end(message.instance, (request, attempt), code=CANCELLED)
        if self.checking:
            self.check()

    # ── what must be true at any time ───────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Everything that the tables say twice, they say alike."""
        registry = self.broker.registry
        table: dict[bytes, RoutingId] = {}
        for worker in registry.workers.values():
            self._check_worker(worker)
            readers: Counter[int] = Counter()
            for request in worker.live.values():
                client = request.client
                if client is not None:
                    assert client.requests[request.request] is request
                    if not request.away:
                        readers[client.number] += 1
                        table[worker.routing_id + codec.chunks_route(client.number)] = client.routing_id
            assert worker.routes == dict(readers)
        assert {key: route.client for key, route in self.broker.routes.table.items()} == table
        for client in registry.clients.values():
            self._check_client(client)

    def _check_worker(self, worker: WorkerPeer) -> None:
        assert worker.aside <= worker.live.keys()
        for key, request in worker.live.items():
            assert request.key == key
            assert request.worker is worker
            takes_slot = key not in worker.aside
            assert request.engine is None or (key in request.engine.live) is takes_slot
            assert request.host is None or (key in request.host.live) is takes_slot
        for engine in worker.engines.values():
            assert engine.live <= worker.live.keys()

    def _check_client(self, client: ClientPeer) -> None:
        assert (client.routing_id in self.broker.sessions.peers) is not client.away
        for number, request in client.requests.items():
            assert request.request == number
            assert request.client is client
            assert request.away or not client.away

    def live(self) -> list[Request]:
        """All that is in workers' hands."""
        return [request for worker in self.broker.registry.workers.values() for request in worker.live.values()]

    def check_rest(self) -> None:
        """Nothing is left of any request."""
        assert self.live() == []
        for client in self.broker.registry.clients.values():
            assert client.requests == {}
        for model in self.broker.registry.models.values():
            assert len(model.queue) == 0
        assert self.broker.scheduler.figures.queued_bytes == 0


def _header(message: Struct) -> bytes:
    if isinstance(message, Submit | Dispatch | Ends):
        return codec.pack_envelope(message)
    return codec.pack(message)[0]


def decoded(header: bytes) -> Any:
    """What a message says; None where there is nothing in it."""
    kind = header[0]
    if kind == kinds.CHUNKS:
        return codec.unpack_chunks(header).rows()
    if kind in kinds.WITH_BODY:
        return codec.unpack_envelope(header)
    return codec.unpack_control(header) if len(header) > 1 else None


def model_of(name: str, *capabilities: str, **fields: Any) -> ModelInfo:
    """A model that generates, and goes on in mid-answer, unless said otherwise."""
    return ModelInfo(name=name, capabilities=list(capabilities or ("generate", "resume")), **fields)


def claim_of(request: int, attempt: int, next_unit: int) -> Claim:
    return Claim(request=request, attempt=attempt, next=next_unit, window=200, model="m")


def carried_of(instance: int, request: int, attempt: int = 0, **fields: Any) -> Carried:
    fields = {"operation": "generate", "model": "m", **fields}
    return Carried(instance=instance, request=request, attempt=attempt, **fields)


def faults(peer: Peer) -> list[Fault]:
    """The FAULTs that a peer got since the last call."""
    found = [message for kind, message, _ in peer.inbox if kind == kinds.FAULT]
    peer.inbox = [entry for entry in peer.inbox if entry[0] != kinds.FAULT]
    return found


def beat(peer: Peer) -> None:
    peer.send(Beat())
