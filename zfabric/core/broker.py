"""The controller as a pure machine: sessions, leases and beats here; requests at the `RequestDesk`.

Two doors. Chunks take the narrow one: the driver looks `routes` up itself and passes the frames on. Everything else comes
in through `receive`, decoded and checked, and never raises: a bad message is answered with a FAULT to its sender.

Theory of operation. A peer is a connection: the ROUTER's routing id names it, and dies with it. A session begins with a
HELLO on a connection and ends with the connection, a GOODBYE or a lapsed lease; at its end its requests are settled at
once (`client_lost`, `worker_lost`), so nothing has to be reconciled when the same program comes back on another
connection. The one exception is a new controller, which knows nobody: see `recovery`.

The caller performs `outbox.take()` in order after every call, and calls `tick` when `next_deadline_ns` has come.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from zfabric.core import status
from zfabric.core.access import EVERYBODY, Grant
from zfabric.core.broker_config import BrokerConfig
from zfabric.core.desk import RequestDesk
from zfabric.core.outbox import Outbox
from zfabric.core.recovery import Recovery
from zfabric.core.registry import ClientPeer, Registry, WorkerPeer, WorkerState
from zfabric.core.routes import Routes
from zfabric.core.timers import Timers
from zfabric.errors import (
    FabricError,
    NameTakenError,
    NoWorkerError,
    ProtocolError,
    QuotaExceededError,
    VersionMismatchError,
    WorkerLostError,
)
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import BAD_FRAMES_MAX, FRAME_BYTES_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Answer, Beat, ClientHello, Drain, Goodbye, Load, Query, Welcome, WorkerHello

Peer = ClientPeer | WorkerPeer
#: Queries that change something.
_OPERATOR_QUERIES: Final = frozenset({"drain", "refresh"})


class Broker:
    """All of a controller but its socket and its clock.

    Args:
        config: Policy, timings and bounds.
        rng: Chance, for policies and numbers.
        now_ns: The time of the start.
        build: Version string told to peers.
        make_token: Session tokens; must be unguessable outside of simulations.
    """

    def __init__(
        self,
        config: BrokerConfig,
        rng: random.Random,
        now_ns: int,
        build: str = "",
        make_token: Callable[[], bytes] | None = None,
    ) -> None:
        self.config = config
        self.build = build
        self.epoch = rng.getrandbits(63)
        self.started_ns = now_ns
        self.timers = Timers()
        self.timers.now_ns = now_ns
        self.outbox = Outbox()
        self.routes = Routes()
        self.registry = Registry(rng)
        self.desk = RequestDesk(config, self.registry, self.timers, self.outbox, self.routes, rng)
        self.recovery = Recovery(self.desk.endings, self.registry, self.outbox)
        self.workers_lost = self.clients_lost = self.bad_frames = 0
        #: The driver's own figures, shown in the status.
        self.transport_figures: Callable[[], dict[str, int]] = dict
        #: What the key of a connection allows.
        self.grant_of: Callable[[RoutingId], Grant] = lambda _: EVERYBODY
        self._make_token = make_token or (lambda: rng.randbytes(16))
        self._peers: dict[RoutingId, Peer] = {}
        self._faults: dict[RoutingId, int] = {}
        self._session = rng.getrandbits(31)
        if config.recovery_ms:
            self.desk.recovering = True
            self.timers.at(now_ns + milliseconds(config.recovery_ms), lambda _: self._recovered())
        else:
            self.recovery.active = False

    # ── doors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, sender: RoutingId, header: bytes, body: bytes, now_ns: int) -> None:
        """The wide door: any message but a routed chunk. Never raises for what a peer sent."""
        self.timers.now_ns = now_ns
        peer = self._peers.get(sender)
        if peer is not None:
            peer.heard_ns = now_ns
        try:
            kind = header[0] if header else -1
            if kind == kinds.CLIENT_HELLO:
                self._client_hello(sender, codec.unpack_control(header), now_ns)
            elif kind == kinds.WORKER_HELLO:
                self._worker_hello(sender, codec.unpack_control(header), now_ns)
            elif peer is None:
                if kind != kinds.GOODBYE:
                    self.outbox.send(sender, codec.pack_unknown_session())
            elif isinstance(peer, ClientPeer):
                self._from_client(peer, kind, header, body, now_ns)
            else:
                self._from_worker(peer, kind, header, body, now_ns)
        except FabricError as error:
            self._bad(sender, error)

    def disconnected(self, peer_id: RoutingId, now_ns: int) -> None:
        """The transport knows that a connection is gone, or that its pipe stayed full for too long."""
        self.timers.now_ns = now_ns
        self._faults.pop(peer_id, None)
        peer = self._peers.get(peer_id)
        if isinstance(peer, WorkerPeer):
            self._remove_worker(peer, f"connection to worker {peer.name!r} was lost")
        elif peer is not None:
            self._remove_client(peer)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        self.timers.now_ns = now_ns
        self.timers.run(now_ns)

    def next_deadline_ns(self) -> int | None:
        """When `tick` has to be called next."""
        return self.timers.next_ns()

    def drain(self, now_ns: int) -> None:
        """Take no new requests; running ones go on."""
        self.timers.now_ns = now_ns
        self.desk.draining = True

    def goodbye(self) -> None:
        """Tell everybody that this controller leaves. Workers go on and announce their work to the next one."""
        for peer_id in self._peers:
            self.outbox.send(peer_id, codec.pack(Goodbye("the controller stops")))

    @property
    def in_flight(self) -> int:
        """Requests that have not had their terminal."""
        return sum(len(client.requests) for client in self.registry.clients.values())

    def _bad(self, sender: RoutingId, error: FabricError) -> None:
        self.bad_frames += 1
        if sender not in self._peers:
            self.outbox.send(sender, codec.pack_refused(error))
            return
        count = self._faults[sender] = self._faults.get(sender, 0) + 1
        if count <= BAD_FRAMES_MAX:
            self.outbox.send(sender, codec.pack_fault(error))

    # ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _client_hello(self, sender: RoutingId, hello: ClientHello, now_ns: int) -> None:
        _check_version(hello.version, hello.build, self.build)
        grant = self.grant_of(sender)
        grant.check_client()
        known = self._peers.get(sender)
        if known is not None:
            raise ProtocolError("this connection has a session already")
        former = self.registry.clients.get(hello.instance)
        if former is not None:
            if former.token != hello.token:
                raise NameTakenError("another client has this instance number")
            self._remove_client(former)
        if len(self.registry.clients) >= self.config.clients_max:
            raise QuotaExceededError(
                f"{len(self.registry.clients)} clients are connected, limit is {self.config.clients_max}"
            )
        client = ClientPeer(self._next_session(), hello, self._make_token(), sender, grant, now_ns)
        self.registry.clients[client.instance] = client
        self._peers[sender] = client
        self.outbox.send(sender, self._welcome(client.number, client.token))
        self.recovery.client_back(client, hello.claims)

    def _worker_hello(self, sender: RoutingId, hello: WorkerHello, now_ns: int) -> None:
        _check_version(hello.version, hello.build, self.build)
        grant = self.grant_of(sender)
        grant.check_worker(hello.name)
        for info in hello.models:
            for name in (info.name, *info.aliases):
                grant.check_model(name)
        present = self._peers.get(sender)
        if present is not None:
            if not isinstance(present, WorkerPeer) or present.name != hello.name:
                raise ProtocolError("this connection has a session already")
            self._announce(present, hello, now_ns)
            return
        former = self.registry.workers.get(hello.name)
        if former is not None:
            self._take_over(former, hello)
        if len(self.registry.workers) >= self.config.workers_max:
            raise QuotaExceededError(
                f"{len(self.registry.workers)} workers are registered, limit is {self.config.workers_max}"
            )
        worker = WorkerPeer(hello, self._next_session(), self._make_token(), sender, now_ns)
        self._peers[sender] = worker
        self.outbox.send(sender, self._welcome(worker.session, worker.token))
        self.registry.announce(worker, hello.models)
        # Only a session's first HELLO tells of what came before it: one said twice must not touch what runs now.
        self.recovery.worker_back(worker, hello.carried)
        self._announce(worker, hello, now_ns)
        if worker.beats:
            worker.lease = self.timers.at(
                now_ns + milliseconds(self.config.lease_ms), lambda now: self._lease(worker, now)
            )

    def _take_over(self, former: WorkerPeer, hello: WorkerHello) -> None:
        """A second HELLO under a name: the same worker on a new connection may, anybody else may not.

        Raises:
            NameTakenError: The name's holder is, as far as is known, alive. It is probed: if it is not, the next try
                of the newcomer succeeds.
        """
        if former.instance == hello.instance and former.token == hello.token:
            self._remove_worker(former, f"worker {former.name!r} came back on another connection")
            return
        self.outbox.send(former.routing_id, codec.pack(Beat(0)))
        raise NameTakenError(f"a live worker is named {hello.name!r}", worker=hello.name)

    def _announce(self, worker: WorkerPeer, hello: WorkerHello, now_ns: int) -> None:
        worker.speed = hello.speed
        dropped = self.registry.announce(worker, hello.models)
        self._load(worker, hello.load, now_ns)
        for model in [*dropped, *(hosting.model for hosting in worker.hosts.values())]:
            self.desk.hosts_changed(model)
        self.desk.fill(worker, now_ns)

    def _welcome(self, session: int, token: bytes) -> codec.Frames:
        return codec.pack(
            Welcome(
                version=kinds.PROTOCOL_VERSION,
                build=self.build,
                epoch=self.epoch,
                session=session,
                token=token,
                beat_ms=self.config.beat_ms,
                lease_ms=self.config.lease_ms,
                frame_bytes_max=FRAME_BYTES_MAX,
            )
        )

    def _next_session(self) -> int:
        self._session = (self._session + 1) & 0xFFFFFFFF
        return self._session

    def _remove_client(self, client: ClientPeer) -> None:
        self.clients_lost += 1
        workers = {r.worker.name: r.worker for r in client.requests.values() if r.worker is not None}
        self.routes.client_gone(list(workers.values()), client)
        self.desk.endings.client_lost(client)
        self.registry.clients.pop(client.instance, None)
        self._peers.pop(client.routing_id, None)

    def _remove_worker(self, worker: WorkerPeer, why: str) -> None:
        self.workers_lost += 1
        worker.state = WorkerState.GONE
        self.timers.cancel(worker.lease)
        self._peers.pop(worker.routing_id, None)
        models = [self.registry.withdraw(worker, name) for name in list(worker.hosts)]
        self.registry.workers.pop(worker.name, None)
        self.desk.endings.worker_lost(worker, WorkerLostError(why, worker=worker.name))
        for model in models:
            self.desk.hosts_changed(model)

    def _lease(self, worker: WorkerPeer, now_ns: int) -> None:
        """Traffic renews a lease by a time stamp alone; the timer looks whether there was some."""
        due_ns = worker.heard_ns + milliseconds(self.config.lease_ms)
        if now_ns < due_ns:
            worker.lease = self.timers.at(due_ns, lambda now: self._lease(worker, now))
            return
        silent_ms = (now_ns - worker.heard_ns) // 1_000_000
        self.outbox.send(worker.routing_id, codec.pack_unknown_session())
        self._remove_worker(
            worker, f"worker {worker.name!r} was silent for {silent_ms} ms, lease is {self.config.lease_ms} ms"
        )

    def _recovered(self) -> None:
        self.desk.recovering = False
        self.recovery.finish()

    # ── from clients ────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_client(self, client: ClientPeer, kind: int, header: bytes, body: bytes, now_ns: int) -> None:
        if kind == kinds.SUBMIT:
            self.desk.submit(client, codec.unpack_envelope(header), body, now_ns)
        elif kind == kinds.CREDIT:
            self.desk.endings.credit(client, codec.unpack_control(header))
        elif kind == kinds.CANCEL:
            self.desk.endings.cancel(client, codec.unpack_control(header).requests)
        elif kind == kinds.BEAT:
            self.outbox.send(client.routing_id, codec.pack(codec.unpack_control(header)))
        elif kind == kinds.QUERY:
            self._query(client, codec.unpack_control(header))
        elif kind == kinds.GOODBYE:
            self._remove_client(client)
        else:
            raise ProtocolError(f"{_kind_name(kind)} is not a client's message", kind=kind)

    def _query(self, client: ClientPeer, query: Query) -> None:
        try:
            if query.what in _OPERATOR_QUERIES:
                client.grant.check_operator(query.what)
            if query.what == "drain":
                result: object = self._drain_worker(query.arguments)
            elif query.what == "refresh":
                result = self._refresh()
            else:
                result = status.answer(self, query.what, query.arguments)
        except FabricError as error:
            answer = Answer(number=query.number, code=error.code, message=codec.told(error), details=error.details)
        else:
            answer = Answer(number=query.number, code=0, result=codec.raw(result))
        self.outbox.send(client.routing_id, codec.pack(answer))

    def _refresh(self) -> list[str]:
        """Have every worker report now; one whose connection is gone is found out by the attempt. Nothing is forgotten
        meanwhile. Returns their names."""
        for worker in self.registry.workers.values():
            self.outbox.send(worker.routing_id, codec.pack(Beat(0)))
        return sorted(self.registry.workers)

    def _drain_worker(self, arguments: dict[str, object]) -> str:
        """Have a worker finish and leave. Returns its name."""
        name, limit_ms = arguments.get("worker"), arguments.get("limit_ms", 0)
        worker = self.registry.workers.get(name) if isinstance(name, str) else None
        if worker is None:
            raise NoWorkerError(f"no worker is named {name!r}", worker=str(name))
        if not isinstance(limit_ms, int) or not 0 <= limit_ms <= 2**32 - 1:
            raise ProtocolError(f"limit_ms is {limit_ms!r}, it must be a number of milliseconds")
        self._set_draining(worker)
        self.outbox.send(worker.routing_id, codec.pack(Drain(limit_ms)))
        return worker.name

    # ── from workers ────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_worker(self, worker: WorkerPeer, kind: int, header: bytes, body: bytes, now_ns: int) -> None:
        if kind == kinds.ENDS:
            self.desk.endings.ends(worker, codec.unpack_envelope(header), header, body, now_ns)
            self.desk.fill(worker, now_ns)
        elif kind == kinds.LOAD:
            self._load(worker, codec.unpack_control(header), now_ns)
            self.outbox.send(worker.routing_id, codec.pack(Beat(worker.load.dispatches + 1)))
            self.desk.fill(worker, now_ns)
        elif kind == kinds.GOODBYE:
            self._remove_worker(worker, f"worker {worker.name!r} left")
        elif kind != kinds.CHUNKS:
            # A chunk that has no route is late, not wrong: its request was cancelled while it was on its way.
            raise ProtocolError(f"{_kind_name(kind)} is not a worker's message", kind=kind)

    def _load(self, worker: WorkerPeer, load: Load, now_ns: int) -> None:
        """Take a load report; notice an engine that hangs, and one that moves again."""
        moved = load.progress != worker.load.progress or not worker.in_flight
        worker.load = load
        if moved:
            worker.moved_ns = now_ns
            if worker.state is WorkerState.STALLED:
                worker.state = WorkerState.READY
        if load.draining:
            self._set_draining(worker)
        silent_ms = (now_ns - worker.moved_ns) // 1_000_000
        if worker.state is WorkerState.READY and silent_ms >= self.config.stall_ms:
            self.desk.endings.worker_stalled(worker, silent_ms)
        self.registry.refresh(worker)

    def _set_draining(self, worker: WorkerPeer) -> None:
        if worker.state is WorkerState.READY or worker.state is WorkerState.STALLED:
            worker.state = WorkerState.DRAINING
        self.registry.refresh(worker)


def _kind_name(kind: int) -> str:
    return kinds.NAMES.get(kind, f"kind {kind}")


def _check_version(version: int, build: str, own_build: str) -> None:
    if version != kinds.PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"peer {build!r} speaks protocol {version}, controller {own_build!r} speaks {kinds.PROTOCOL_VERSION}",
            peer=version,
            controller=kinds.PROTOCOL_VERSION,
        )
