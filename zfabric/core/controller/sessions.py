"""Sessions: who is there, from a HELLO to the end of its connection, and what becomes of its requests then.

A peer is a connection: the ROUTER's routing id names it, and dies with it. A session begins with a HELLO and ends with the
connection, a GOODBYE or a lapsed lease. A peer that says GOODBYE is gone for good, and its requests are settled at once. One
whose connection was lost may be back in a moment: what both ends still have then goes on (`Recovery`).

* A client that was lost is `away` for CLAIM_MS. It comes back by the same instance, with the token of its last session or
  the secret; under this client's number nobody else is let in. What it does not claim is stopped CLAIM_MS after that.
* A worker that was lost is gone at once, since its clients may have better to do than to wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zfabric.core.controller.access import Grant
from zfabric.core.controller.cells import loop_of
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.engines import EngineWatch
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.outbox import Outbox
from zfabric.core.controller.peers import ClientPeer, Request, WorkerPeer, WorkerState
from zfabric.core.controller.recovery import Recovery
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.scheduler import Scheduler
from zfabric.core.timers import Timers
from zfabric.errors import (
    FabricError,
    NameTakenError,
    PermissionDeniedError,
    ProtocolError,
    QuotaExceededError,
    WorkerLostError,
)
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import FRAME_BYTES_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import Beat, ClientHello, ModelInfo, Welcome, WorkerHello

Peer = ClientPeer | WorkerPeer


class Sessions:
    """Opens and ends sessions.

    Args:
        grant_of: What the key of a connection allows.
        build, epoch: Of this controller, told to peers.
        make_token: Session tokens; must be unguessable outside of simulations.
        first: The number of the first session.
    """

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        scheduler: Scheduler,
        recovery: Recovery,
        watch: EngineWatch,
        timers: Timers,
        outbox: Outbox,
        journal: Journal,
        *,
        grant_of: Callable[[RoutingId], Grant],
        build: str,
        epoch: int,
        make_token: Callable[[], bytes],
        first: int,
    ) -> None:
        self._config = config
        self._registry = registry
        self._scheduler = scheduler
        self._recovery = recovery
        self._watch = watch
        self._timers = timers
        self._outbox = outbox
        self._journal = journal
        self._grant_of = grant_of
        self._build = build
        self._epoch = epoch
        self._make_token = make_token
        self._session = first
        #: Clients whose connection was lost, the longest lost first.
        self._away: dict[int, ClientPeer] = {}
        self.peers: dict[RoutingId, Peer] = {}
        self.workers_lost = self.clients_lost = 0
        self.workers_left = self.clients_left = 0

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def client_hello(self, sender: RoutingId, hello: ClientHello, now_ns: int) -> None:
        """A client introduces itself. Raises: FabricError, why there is no session for it."""
        grant = self._grant_of(sender)
        grant.check_asks()
        present = self.peers.get(sender)
        if isinstance(present, ClientPeer) and present.instance != hello.instance:
            # It has taken another number, since an earlier HELLO under the former one was refused: that one is over.
            self.client_left(present)
        elif present is not None:
            if not isinstance(present, ClientPeer):
                raise ProtocolError("this connection has a session already")
            # It did not wait for the answer. Only a session's first HELLO tells of what came before it.
            self._welcome(sender, present.number, present.token, present.minor)
            return
        self.check_kicked(hello.instance, now_ns)
        self._check_instance(hello)
        client = self._registry.clients.get(hello.instance)
        if client is not None and not client.away:
            self.client_lost(client)
        client = self._away.pop(hello.instance, None)
        number, token = self.next_session(), self._make_token()
        if client is None:
            self._make_room()
            client = self._registry.clients[hello.instance] = ClientPeer(number, hello, token, sender, grant, now_ns)
            returned = False
        else:
            client.open_session(number, hello, token, sender, grant, now_ns)
            self._settle_later(client)
            returned = True
        self._journal.note("client_registered", client=client.shown, returned=returned, claims=len(hello.claims))
        self.peers[sender] = client
        self._welcome(sender, number, token, client.minor)
        self._recovery.claim(client, hello.claims)

    def check_kicked(self, instance: int, now_ns: int) -> None:
        """Raises: PermissionDeniedError, an operator lets the client have no session for now."""
        kick = self._registry.directives.kicked.get(instance)
        if kick is not None:
            raise _kicked(kick.by, (kick.until_ns - now_ns) // 1_000_000)

    def kick(self, client: ClientPeer, by: str, refuse_ms: int) -> None:
        """An operator ends a client's session. What it had in flight has ended before."""
        self.client_left(client)
        if not client.away:
            self._outbox.send(client.routing_id, codec.pack_refused(_kicked(by, refuse_ms)))

    def _check_instance(self, hello: ClientHello) -> None:
        """Raises: NameTakenError, the client's number is another's."""
        former = self._registry.clients.get(hello.instance)
        if former is None or (former.token == hello.token and not former.remote):
            return
        if former.remote or not hello.secret or lock_of(hello.secret) != former.lock:
            raise NameTakenError("another client has this instance number")

    def _make_room(self) -> None:
        """Let one more client in: whoever has been away for the longest time gives way. Raises: QuotaExceededError."""
        clients = self._registry.clients
        if len(clients) >= self._config.clients_max and self._away:
            self._forget(next(iter(self._away.values())))
        if len(clients) >= self._config.clients_max:
            raise QuotaExceededError(f"{len(clients)} clients are connected, limit is {self._config.clients_max}")

    def client_lost(self, client: ClientPeer) -> None:
        """A client's connection is gone, and the client may be back."""
        self.clients_lost += 1
        self._journal.note("client_lost", client=client.shown, in_flight=len(client.requests))
        self.peers.pop(client.routing_id, None)
        client.away = True
        self._scheduler.endings.client_away(client)
        if client.requests:
            self._away[client.instance] = client
            self._settle_later(client)
        else:
            self._forget(client)

    def client_left(self, client: ClientPeer) -> None:
        """A client is gone for good."""
        self.clients_left += 1
        self._journal.note("client_left", client=client.shown, in_flight=len(client.requests))
        self.peers.pop(client.routing_id, None)
        self._forget(client)

    def _settle_later(self, client: ClientPeer) -> None:
        self._timers.cancel(client.settle)
        until_ns = self._timers.now_ns + milliseconds(self._config.claim_ms)
        client.settle = self._timers.judge_at(until_ns, lambda _: self._settle(client))

    def _settle(self, client: ClientPeer) -> None:
        """Stop what a client has not claimed."""
        if client.away:
            self._forget(client)
        else:
            self._scheduler.endings.abandon([request for request in client.requests.values() if request.away])

    def _forget(self, client: ClientPeer) -> None:
        self._timers.cancel(client.settle)
        self._scheduler.endings.client_left(client)
        self._away.pop(client.instance, None)
        self._registry.clients.pop(client.instance, None)

    # ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def worker_hello(self, sender: RoutingId, hello: WorkerHello, now_ns: int) -> None:
        """A worker introduces itself, or announces other models. Raises: FabricError, why that is refused."""
        grant = self._grant_of(sender)
        if len({info.name for info in hello.models}) < len(hello.models):
            raise ProtocolError(f"worker {hello.name!r} announces two models of the same name", worker=hello.name)
        _check_worker(grant, hello.name, hello.models)
        present = self.peers.get(sender)
        if (loop := loop_of(hello, self._epoch)) is not None:
            if isinstance(present, WorkerPeer):
                self.left(present)
            raise loop
        if present is not None:
            if not isinstance(present, WorkerPeer) or (present.name, present.instance) != (hello.name, hello.instance):
                raise ProtocolError("this connection has a session already")
            self._note_change(present, hello)
            self._announce(present, hello, now_ns)
            return
        former = self._registry.workers.get(hello.name)
        if former is not None:
            self._take_over(former, hello)
        if len(self._registry.workers) >= self._config.workers_max:
            raise QuotaExceededError(
                f"{len(self._registry.workers)} workers are registered, limit is {self._config.workers_max}"
            )
        worker = WorkerPeer(hello, self.next_session(), self._make_token(), sender, grant, now_ns)
        self.peers[sender] = worker
        self._welcome(sender, worker.session, worker.token, worker.minor)
        self._journal.note(
            "worker_registered",
            worker=worker.name,
            models=[info.name for info in hello.models],
            slots=hello.load.slots,
            speed=hello.speed,
            carried=len(hello.carried),
        )
        self._registry.announce(worker, hello.models)
        # Only a session's first HELLO tells of what came before it: one said twice must not touch what runs now.
        self._recovery.worker_back(worker, hello.carried)
        self._announce(worker, hello, now_ns)
        self._recovery.searches.came(worker)
        if worker.beats:
            self._watch_lease(worker, now_ns)

    def _take_over(self, former: WorkerPeer, hello: WorkerHello) -> None:
        """A second HELLO under a name: the same worker on a new connection may, anybody else may not.

        Raises:
            NameTakenError: The name's holder is, as far as is known, alive. It is probed: if it is not, the next try
                of the newcomer succeeds.
        """
        if former.instance == hello.instance and former.token == hello.token:
            self.worker_lost(former, f"worker {former.name!r} came back on another connection")
            return
        self._outbox.send(former.routing_id, codec.pack(Beat(0)))
        # It may be this very worker, by another of this controller's endpoints.
        raise NameTakenError(f"a live worker is named {hello.name!r}", worker=hello.name, epoch=self._epoch)

    def _announce(self, worker: WorkerPeer, hello: WorkerHello, now_ns: int) -> None:
        worker.announced(hello)
        worker.speed = self._registry.directives.speeds.get(worker.name, hello.speed)
        self._registry.announce(worker, hello.models)
        self._scheduler.adapters.announced(worker)
        self._watch.report(worker, hello.load, now_ns)
        self._scheduler.fill(worker, now_ns)

    def _note_change(self, worker: WorkerPeer, hello: WorkerHello) -> None:
        names = {info.name for info in hello.models}
        gained, dropped = sorted(names - worker.hosts.keys()), sorted(worker.hosts.keys() - names)
        if gained or dropped:
            self._journal.note("models_announced", worker=worker.name, gained=gained, dropped=dropped)

    def worker_lost(self, worker: WorkerPeer, why: str) -> None:
        """A worker's connection is gone, or nothing was heard of it for too long. It may be back."""
        claim_ms = self._config.claim_ms
        self.workers_lost += 1
        self._journal.note("worker_lost", worker=worker.name, why=why, in_flight=worker.in_flight)
        requests = self._remove(worker, WorkerLostError(why, worker=worker.name, claim_ms=claim_ms))
        self._recovery.worker_lost(worker, requests)

    def worker_left(self, worker: WorkerPeer, why: str) -> None:
        """A worker is gone for good."""
        self.workers_left += 1
        self._journal.note("worker_left", worker=worker.name, in_flight=worker.in_flight)
        self._remove(worker, WorkerLostError(why, worker=worker.name))

    def _remove(self, worker: WorkerPeer, error: FabricError) -> list[Request]:
        worker.state = WorkerState.GONE
        self._scheduler.adapters.gone(worker)
        self._recovery.searches.gone(worker)
        self._timers.cancel(worker.lease)
        self.peers.pop(worker.routing_id, None)
        for name in list(worker.hosts):
            self._registry.withdraw(worker, name)
        self._registry.remove(worker)
        return self._scheduler.endings.worker_lost(worker, error)

    def _watch_lease(self, worker: WorkerPeer, now_ns: int) -> None:
        due_ns = worker.heard_ns + milliseconds(self._config.lease_ms)
        worker.lease = self._timers.judge_at(due_ns, lambda now: self._lease(worker, now))

    def _lease(self, worker: WorkerPeer, now_ns: int) -> None:
        """Traffic renews a lease by a time stamp alone; the timer looks whether there was some."""
        if now_ns < worker.heard_ns + milliseconds(self._config.lease_ms):
            self._watch_lease(worker, now_ns)
            return
        silent_ms = (now_ns - worker.heard_ns) // 1_000_000
        self._outbox.send(worker.routing_id, codec.pack_unknown_session())
        self.worker_lost(
            worker, f"worker {worker.name!r} was silent for {silent_ms} ms, lease is {self._config.lease_ms} ms"
        )

    # ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def review(self) -> list[RoutingId]:
        """Keys may allow something else from now on. Who may not have its session any more is told so, and loses it; what it had
        in flight ends with it, at other workers the clients of a worker go on.

        Returns:
            Whose sessions have ended.
        """
        ended: list[RoutingId] = []
        for peer_id, peer in list(self.peers.items()):
            try:
                grant = self._grant_of(peer_id)
                self._check_still(peer, grant)
            except FabricError as error:
                self._revoke(peer, error)
                ended.append(peer_id)
            else:
                peer.grant = grant
        return ended

    def _check_still(self, peer: Peer, grant: Grant) -> None:
        """Raises: FabricError, why this session may not go on with this grant."""
        if isinstance(peer, WorkerPeer):
            _check_worker(grant, peer.name, [host.info for host in peer.hosts.values()])
            return
        grant.check_asks()
        if grant.roles != peer.grant.roles:
            raise PermissionDeniedError(f"key {grant.name!r} has another role now", key=grant.name)

    def _revoke(self, peer: Peer, error: FabricError) -> None:
        in_flight = len(peer.requests) if isinstance(peer, ClientPeer) else peer.in_flight
        self._journal.note(
            "session_revoked",
            peer=peer.shown,
            key=peer.grant.name,
            error=error.message,
            code=error.code,
            in_flight=in_flight,
        )
        if isinstance(peer, ClientPeer):
            self._scheduler.endings.stop(list(peer.requests.values()), error)
        self.left(peer)
        self._outbox.send(peer.routing_id, codec.pack_refused(error))

    # ── both ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def lost(self, peer: Peer) -> None:
        """A connection is gone."""
        if isinstance(peer, WorkerPeer):
            self.worker_lost(peer, f"connection to worker {peer.name!r} was lost")
        else:
            self.client_lost(peer)

    def left(self, peer: Peer) -> None:
        """A peer is gone for good."""
        if isinstance(peer, WorkerPeer):
            self.worker_left(peer, f"worker {peer.name!r} left")
        else:
            self.client_left(peer)

    def _welcome(self, to: RoutingId, session: int, token: bytes, minor: int) -> None:
        welcome = Welcome(
            version=kinds.PROTOCOL_VERSION,
            build=self._build,
            epoch=self._epoch,
            session=session,
            token=token,
            beat_ms=self._config.beat_ms,
            lease_ms=self._config.lease_ms,
            frame_bytes_max=FRAME_BYTES_MAX,
            minor=minor,
        )
        self._outbox.send(to, codec.pack(welcome))

    def next_session(self) -> int:
        """The number of the next session."""
        # 0 is nobody's.
        self._session = self._session % 0xFFFFFFFF + 1
        return self._session


def _check_worker(grant: Grant, worker: str, models: Iterable[ModelInfo]) -> None:
    """Raises: PermissionDeniedError, the key may not have a worker of this name, or with one of these models."""
    grant.check_worker(worker)
    for info in models:
        for name in (info.name, *info.aliases, *info.loadable):
            grant.check_model(name)


def _kicked(by: str, left_ms: int) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"operator {by!r} has ended this client's session, and lets it have none for another {left_ms} ms",
        by=by,
        left_ms=left_ms,
    )
