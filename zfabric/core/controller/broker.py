"""The controller as a pure machine: two doors, and what is behind them.

Chunks take the narrow door: the driver looks `routes` up itself and passes the frames on. Everything else comes in through
`receive`, decoded and checked, and never raises: a bad message is answered with a FAULT to its sender that names what it
was about, and nobody else notices.

Behind the doors: `sessions` (who is there), `scheduler` (requests up to a worker), its `endings` (their terminals), `recovery`
(what goes on after a lost connection), `watch` (engines that hang) and `queries`.

The caller performs `outbox.take()` in order after every call, and calls `tick` when `next_deadline_ns` has come.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace

from zfabric.core.controller import queries
from zfabric.core.controller.access import EVERYBODY, Grant
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.engines import EngineWatch
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.outbox import Outbox
from zfabric.core.controller.peers import ClientPeer, WorkerPeer
from zfabric.core.controller.recovery import Recovery
from zfabric.core.controller.registry import Registry
from zfabric.core.controller.request_state import RequestState
from zfabric.core.controller.routes import Routes
from zfabric.core.controller.scaling import Rule, Scaling
from zfabric.core.controller.scheduler import Scheduler
from zfabric.core.controller.sessions import Sessions
from zfabric.core.controller.spans import AttemptSpan
from zfabric.core.recorder import Recorder
from zfabric.core.spans import Spans
from zfabric.core.timers import Timers
from zfabric.errors import FabricError, ProtocolError
from zfabric.ids import RoutingId, milliseconds
from zfabric.limits import BAD_FRAMES_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Beat, Claim, Ends, Goodbye, Submit


def _raise(error: Exception, kind: int) -> None:
    raise error


class Broker:
    """All of a controller but its socket and its clock.

    Args:
        config: Policy, timings and bounds.
        rng: Chance, for policies and numbers.
        now_ns: The time of the start.
        build: Version string told to peers.
        make_token: Session tokens; must be unguessable outside of simulations.
        recorded: Whether to have a `recorder`.
    """

    def __init__(
        self,
        config: BrokerConfig,
        rng: random.Random,
        now_ns: int,
        build: str = "",
        make_token: Callable[[], bytes] | None = None,
        recorded: bool = False,
    ) -> None:
        # Its operator may change it, and the caller's is the caller's.
        self.config = config = replace(config)
        #: What it was told at the start, by name.
        self.started_with = asdict(config)
        self.build = build
        self.epoch = rng.getrandbits(63)
        self.started_ns = now_ns
        self.timers = timers = Timers()
        timers.now_ns = now_ns
        self.outbox = outbox = Outbox()
        self.recorder = Recorder(lambda: timers.now_ns) if recorded else None
        if self.recorder is not None:
            self.recorder.record("started", (build,))
        self.journal = journal = Journal(self.recorder)
        self.routes = Routes()
        self.registry = registry = Registry(rng)
        self.scheduler = scheduler = Scheduler(config, registry, timers, outbox, self.routes, rng, journal)
        self.scaling = Scaling(registry, timers, scheduler.queues, scheduler.figures)
        self.recovery = Recovery(
            config, registry, scheduler.endings, scheduler.observer, timers, outbox, scheduler.affinities
        )
        self.watch = EngineWatch(config, registry, scheduler.endings, journal)
        self.sessions = Sessions(
            config,
            registry,
            scheduler,
            self.recovery,
            self.watch,
            timers,
            outbox,
            journal,
            grant_of=lambda peer: self.grant_of(peer),
            build=build,
            epoch=self.epoch,
            make_token=make_token or (lambda: rng.randbytes(16)),
            first=rng.getrandbits(31),
        )
        #: Messages that were no use, by their kind.
        self.bad_messages: Counter[str] = Counter()
        #: The driver's own figures, shown in the status.
        self.transport_figures: Callable[[], dict[str, int]] = dict
        #: What the host's clock says, for operators who compare logs. Nothing is decided by it.
        self.wall_clock_s: Callable[[], float] = lambda: 0.0
        #: Bytes that wait for a connection's reader.
        self.buffered_of: Callable[[RoutingId], int] = lambda _: 0
        #: What the key of a connection allows.
        self.grant_of: Callable[[RoutingId], Grant] = lambda _: EVERYBODY
        #: Told of an exception that is a fault of this program, with the kind of the message that led to it, or 0. The
        #: message's sender hears of it, and all goes on.
        self.on_bug: Callable[[Exception, int], None] = _raise
        self._rng = rng
        self._faults: dict[RoutingId, int] = {}
        if self.recovery.active:
            scheduler.queues.recovering = True
            timers.judge_at(now_ns + milliseconds(config.recovery_ms), lambda _: self._recovered())

    def trace(self) -> Spans[AttemptSpan]:
        """Note from now on what traces are told. Returns where that is collected."""
        spans: Spans[AttemptSpan] = Spans(self._rng)
        self.scheduler.observer.spans = spans
        return spans

    def scale(self, rules: list[Rule], now_ns: int) -> None:
        """Have these rules decide how many replicas models should have. Raises: ConfigurationError: Two are about one model."""
        self.timers.now_ns = now_ns
        self.scaling.set_rules(rules)

    # ── doors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, sender: RoutingId, header: bytes, body: bytes, now_ns: int) -> None:
        """The wide door: any message but a routed chunk. Never raises for what a peer sent."""
        self.timers.now_ns = now_ns
        peer = self.sessions.peers.get(sender)
        if peer is not None:
            peer.heard_ns = now_ns
        kind = header[0] if header else -1
        try:
            if kind == kinds.CLIENT_HELLO:
                self._check_heard(sender)
                self.sessions.client_hello(sender, codec.unpack_hello(header), now_ns)
            elif kind == kinds.WORKER_HELLO:
                self._check_heard(sender)
                self.sessions.worker_hello(sender, codec.unpack_hello(header), now_ns)
            elif peer is None:
                self._from_nobody(sender, kind)
            elif isinstance(peer, ClientPeer):
                self._from_client(peer, kind, header, body, now_ns)
            else:
                self._from_worker(peer, kind, header, body, now_ns)
        except FabricError as error:
            self._bad(sender, header, error)
        except Exception as error:  # noqa: BLE001 — a bug that one message finds must not cost the others theirs
            self._refuse(sender, header, FabricError(f"the controller failed at this: {type(error).__name__}"))
            self.on_bug(error, kind)
        self.settle()

    def malformed(self, sender: RoutingId, header: bytes, now_ns: int) -> None:
        """A message had more or fewer frames than its kind. The sender is told; a terminal among them goes on with an empty
        body, which its reader cannot decode: the requests end, and their slots are free."""
        self.timers.now_ns = now_ns
        kind = header[0] if header else -1
        self._bad(sender, header, ProtocolError(f"{_kind_name(kind)} has a wrong number of frames", kind=kind))
        if kind == kinds.ENDS and isinstance(self.sessions.peers.get(sender), WorkerPeer):
            self.receive(sender, header, b"", now_ns)
        self.settle()

    def has_session(self, peer_id: RoutingId) -> bool:
        """Whether a peer has said HELLO, and has not lost its session since."""
        return peer_id in self.sessions.peers

    def disconnected(self, peer_id: RoutingId, now_ns: int) -> None:
        """The transport knows that a connection is gone, or that its pipe stayed full for too long."""
        self.timers.now_ns = now_ns
        self._faults.pop(peer_id, None)
        peer = self.sessions.peers.get(peer_id)
        if peer is not None:
            self.sessions.lost(peer)
        self.settle()

    def review_keys(self, now_ns: int) -> list[RoutingId]:
        """`grant_of` may answer otherwise from now on. Returns whose sessions have ended by that."""
        self.timers.now_ns = now_ns
        ended = self.sessions.review()
        self.settle()
        return ended

    def tick(self, now_ns: int) -> None:
        """Do what is due. The caller hands over what has arrived before it comes back for the next time."""
        self.timers.now_ns = now_ns
        while True:
            try:
                self.timers.run(now_ns)
            except Exception as error:  # noqa: BLE001 — as above
                self.on_bug(error, 0)
            else:
                break
        self.settle()

    def settle(self) -> None:
        """What waits follows a change of hosts and names before anything else is looked at."""
        try:
            self.scheduler.queues.settle()
            self.scheduler.adapters.settle()
        except Exception as error:  # noqa: BLE001 — as above
            self.on_bug(error, 0)

    def next_deadline_ns(self) -> int | None:
        """When `tick` has to be called next."""
        return self.timers.next_ns()

    def drain(self, now_ns: int) -> None:
        """Take no new requests; running ones go on, if need be by another attempt at another worker."""
        self.timers.now_ns = now_ns
        self.scheduler.draining = True
        if self.recorder is not None:
            self.recorder.record("drains", (self.in_flight,))

    def goodbye(self) -> None:
        """Tell everybody that this controller leaves. Workers go on and announce their work to the next one."""
        if self.recorder is not None:
            self.recorder.record("stopped", ())
        for peer_id in self.sessions.peers:
            self.outbox.send(peer_id, codec.pack(Goodbye("the controller stops")))

    @property
    def bad_frames(self) -> int:
        """Messages that were no use."""
        return self.bad_messages.total()

    @property
    def in_flight(self) -> int:
        """Requests that have not had their terminal."""
        return sum(len(client.requests) for client in self.registry.clients.values())

    def drained(self, now_ns: int) -> bool:
        """Whether nobody needs this controller any more: nothing is in flight, and no client is about to submit another
        attempt of what a worker has just lost."""
        since_ns = now_ns - milliseconds(self.config.claim_ms)
        return not any(client.requests or client.coming_back(since_ns) for client in self.registry.clients.values())

    def _recovered(self) -> None:
        unclaimed = self.recovery.finish()
        self.scheduler.queues.recovered()
        self.journal.note(
            "recovered",
            streams=self.recovery.matched,
            unclaimed=unclaimed,
            workers=len(self.registry.workers),
            clients=len(self.registry.clients),
        )

    # ── what cannot be used ─────────────────────────────────────────────────────────────────────────────────────────

    def _bad(self, sender: RoutingId, header: bytes, error: FabricError) -> None:
        """A message was no use: say so. Whoever sends such without end has no session any more, and is told that too."""
        kind = _label(header[0] if header else -1)
        self.bad_messages[kind] += 1
        peer = self.sessions.peers.get(sender)
        if peer is None:
            self.journal.note("peer_refused", kind=kind, error=error.message, code=error.code)
            self.outbox.send(sender, codec.pack_refused(error))
            return
        if peer.newer and header and header[0] not in kinds.NAMES:
            # It knows more than this controller, and does without where it is told so.
            self._refuse(sender, header, error)
            return
        count = self._faults[sender] = self._faults.get(sender, 0) + 1
        self._refuse(sender, header, error)
        self.journal.note("bad_message", peer=peer.shown, kind=kind, error=error.message, code=error.code, count=count)
        if count >= BAD_FRAMES_MAX:
            self.sessions.left(peer)
            self.outbox.send(sender, codec.pack_refused(_too_many(error)))

    def _refuse(self, sender: RoutingId, header: bytes, error: FabricError) -> None:
        """Answer one message with a FAULT. What it was about ends with it, at both ends."""
        subject = codec.subject_of(header)
        self.outbox.send(sender, codec.pack_fault(error, subject))
        client = self.sessions.peers.get(sender)
        if subject.request is None or not isinstance(client, ClientPeer):
            return
        request = client.requests.get(subject.request)
        if request is not None and subject.attempt is not None and request.attempt <= subject.attempt:
            # After a bug nobody knows in which tables it is.
            with contextlib.suppress(Exception):
                self.scheduler.endings.abandon([request])
            client.requests.pop(subject.request, None)

    def _is_ignored(self, sender: RoutingId) -> bool:
        """Whether this connection has sent so much that was no use that it is not listened to any more."""
        return self._faults.get(sender, 0) >= BAD_FRAMES_MAX

    def _check_heard(self, sender: RoutingId) -> None:
        """Raises: ProtocolError, this connection gets no session."""
        if self._is_ignored(sender):
            raise _too_many(None)

    def _from_nobody(self, sender: RoutingId, kind: int) -> None:
        if self._is_ignored(sender):
            self.bad_messages[_label(kind)] += 1
        elif kind != kinds.GOODBYE:
            self.outbox.send(sender, codec.pack_unknown_session())

    # ── from clients ────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_client(self, client: ClientPeer, kind: int, header: bytes, body: bytes, now_ns: int) -> None:
        endings = self.scheduler.endings
        if kind == kinds.SUBMIT:
            self.submit(client, codec.unpack_envelope(header), body, now_ns)
        elif kind == kinds.CREDIT:
            endings.credit(client, codec.unpack_control(header))
        elif kind == kinds.CANCEL:
            endings.cancel(client, codec.unpack_control(header).requests)
        elif kind == kinds.CLAIMS:
            self.recovery.claim(client, codec.unpack_control(header).claims)
        elif kind == kinds.BEAT:
            self.outbox.send(client.routing_id, codec.pack(codec.unpack_control(header)))
        elif kind == kinds.QUERY:
            queries.answer(self, client, codec.unpack_control(header))
        elif kind == kinds.GOODBYE:
            self.sessions.client_left(client)
        else:
            raise ProtocolError(f"{_kind_name(kind)} is not a client's message", kind=kind)

    def submit(self, client: ClientPeer, envelope: Submit, body: bytes, now_ns: int) -> None:
        """Take an attempt of a client's, or end it with the reason."""
        live = self.registry.live.get((client.instance, envelope.request, envelope.attempt))
        known = client.requests.get(envelope.request, live)
        unclaimed = known is not None and (known.away or known.state is RequestState.RECOVERED)
        if known is not None and unclaimed and known.attempt == envelope.attempt:
            # It was on its way when the connection was lost, and had arrived. To say it again is to claim it.
            claim = Claim(
                request=known.request, attempt=known.attempt, next=envelope.resume_from, window=envelope.window
            )
            self.recovery.claim(client, [claim])
            return
        self.scheduler.submit(client, envelope, body, now_ns)
        request = client.requests.get(envelope.request) if envelope.attempt else None
        if request is not None and request.state is not RequestState.QUEUED:
            # Until another worker has it, the one that was lost may be the only one that can go on.
            self.recovery.moved_on(client, envelope.request, envelope.attempt)

    # ── from workers ────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_worker(self, worker: WorkerPeer, kind: int, header: bytes, body: bytes, now_ns: int) -> None:
        if kind == kinds.ENDS:
            self._ends(worker, codec.unpack_envelope(header), header, body, now_ns)
            self.scheduler.fill(worker, now_ns)
        elif kind == kinds.LOAD:
            self.watch.report(worker, codec.unpack_control(header), now_ns)
            wanting = self.scheduler.queues.wanting(worker)
            self.outbox.send(worker.routing_id, codec.pack(Beat(worker.load.dispatches + 1, wanting=wanting)))
            self.scheduler.fill(worker, now_ns)
        elif kind == kinds.CARRIED:
            self.recovery.worker_back(worker, codec.unpack_control(header).carried)
        elif kind == kinds.LOCATED:
            self.recovery.searches.located(worker, codec.unpack_control(header))
        elif kind == kinds.GOODBYE:
            self.sessions.left(worker)
        elif kind != kinds.CHUNKS:
            # A chunk that has no route is late, not wrong: its request was cancelled while it was on its way.
            raise ProtocolError(f"{_kind_name(kind)} is not a worker's message", kind=kind)

    def _ends(self, worker: WorkerPeer, envelope: Ends, header: bytes, body: bytes, now_ns: int) -> None:
        adapters = self.scheduler.adapters
        if envelope.instance == adapters.instance:
            for end in envelope.ends:
                adapters.ended(worker, end.request, end.code)
        self.scheduler.endings.ends(worker, envelope, header, body, now_ns)
        adapters.freed(worker)


def _too_many(last: FabricError | None) -> ProtocolError:
    reason = f", the last one was: {last.message}" if last is not None else ""
    return ProtocolError(f"{BAD_FRAMES_MAX} messages of this connection were of no use{reason}")


def _kind_name(kind: int) -> str:
    return kinds.NAMES.get(kind, f"kind {kind}")


def _label(kind: int) -> str:
    """A kind in figures and logs, where what is none has one name."""
    return kinds.NAMES.get(kind, "unknown")
