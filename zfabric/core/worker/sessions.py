"""All sessions of one worker: one with each of its controllers, which share its engines, its slots and its requests.

A request belongs to the session by which it came, until another controller says that its reader is there now. Each session tells
its controller which of the worker's slots are not for it (`Load.elsewhere`): those that others use and, where several
controllers have clients waiting, those that others are to have. Two that send a request for the same slot at once do not overrun
the worker: the later one is handed back.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from zfabric.core.spans import Spans
from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.cached import CacheChange
from zfabric.core.worker.observer import WorkerObserver
from zfabric.core.worker.orders import Columns, StreamOrder, client_name_of
from zfabric.core.worker.session import WorkerSession
from zfabric.core.worker.spans import StreamSpan
from zfabric.core.worker.streams import WorkerStreams
from zfabric.errors import FabricError
from zfabric.wire.load import Load
from zfabric.wire.messages import Carried, ModelInfo
from zfabric.wire.payloads import Delta


class WorkerSessions:
    """What a worker's driver and its engines see of its sessions: as if there were one.

    Args:
        name, instance, rng, build, speed, beats, stream_interval: As of `WorkerSession`.

    Attributes:
        load: What is told to all controllers.
        draining: Whether new requests are handed back.
    """

    def __init__(
        self,
        *,
        name: str,
        instance: int,
        rng: random.Random,
        build: str = "",
        speed: float = 1.0,
        beats: bool = True,
        stream_interval: int = 1,
    ) -> None:
        self.instance = instance
        self.load = Load()
        self.draining = False
        self.observer = WorkerObserver(name)
        self._name = name
        self._rng = rng
        self._build = build
        self._speed = speed
        self._beats = beats
        self._stream_interval = stream_interval
        self._models: list[ModelInfo] | None = None
        self._all: list[WorkerSession] = []
        self._closed: list[WorkerSession] = []
        #: Moves the part of a slot that does not divide from one controller to the next.
        self._turn = 0

    def __iter__(self) -> Iterator[WorkerSession]:
        return iter(self._all)

    def open(self) -> WorkerSession:
        """A session with one more controller."""
        session = WorkerSession(
            name=self._name,
            instance=self.instance,
            rng=self._rng,
            build=self._build,
            speed=self._speed,
            beats=self._beats,
            stream_interval=self._stream_interval,
            load=self.load,
            observer=self.observer,
            siblings=self,
        )
        session.draining = self.draining
        if self._models is not None:
            session.announce(self._models, 0)
        self._all.append(session)
        return session

    def close(self, session: WorkerSession) -> None:
        """A controller is none any more. What came from it may be claimed by the others."""
        session.disconnected()
        self._closed.append(session)
        self._sweep()

    def _sweep(self) -> None:
        """Forget closed sessions of which nothing is left."""
        for session in [session for session in self._closed if session.empty]:
            self._closed.remove(session)
            self._all.remove(session)

    # ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def registered(self) -> bool:
        """Whether any controller has accepted the worker."""
        return any(session.registered for session in self._all)

    @property
    def busy(self) -> bool:
        """Whether any request holds a slot."""
        return any(session.busy for session in self._all)

    @property
    def overrun(self) -> bool:
        """Whether several controllers have sent more than there are slots. What is to stop does not count: one controller alone
        may give what a hung engine holds away."""
        several = len(self._all) > 1
        return several and sum([session.running for session in self._all]) > self.load.slots

    @property
    def held(self) -> int:
        """Requests that hold a slot."""
        return sum([session.held for session in self._all])

    @property
    def count(self) -> int:
        """Requests that run."""
        return sum([len(session.streams) for session in self._all])

    def next_ns(self) -> int | None:
        """When `tick` has to be called next."""
        due = [due_ns for session in self._all if (due_ns := session.timers.next_ns()) is not None]
        return min(due, default=None)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        for session in self._all:
            session.tick(now_ns)
        if len(self._all) > 1 and self.registered:
            # A session that stands does so by itself; an answer of another waits for its reader to come to one that does.
            for session in self._all:
                if not session.registered:
                    session.expire(now_ns)
            self._sweep()
        self.settle(now_ns)

    def trace(self) -> Spans[StreamSpan]:
        """Note from now on what traces are told. Returns where that is collected."""
        self.observer.spans = spans = Spans[StreamSpan](self._rng)
        return spans

    def announce(self, models: Sequence[ModelInfo], now_ns: int) -> None:
        """Set what is served. Raises: ConfigurationError: It cannot be announced; what was announced before stays."""
        for session in self._all:
            session.announce(models, now_ns)
        self._models = list(models)

    def drain(self, now_ns: int) -> None:
        """Take nothing new, which all controllers hear now."""
        self.draining = True
        for session in self._all:
            session.drain(now_ns)

    def undrain(self, now_ns: int) -> None:
        """Take requests again, which all controllers hear now."""
        self.draining = False
        for session in self._all:
            session.undrain(now_ns)

    def goodbye(self, reason: str) -> None:
        """Leave all of them."""
        for session in self._all:
            session.goodbye(reason)

    def cached(self, change: CacheChange, now_ns: int) -> None:
        """An engine's cache changed, which concerns all."""
        for session in self._all:
            session.cached(change, now_ns)

    def carried(self) -> list[Carried]:
        """All that there is of requests, of whichever controller."""
        return [line for session in self._all for line in session.carried()]

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, request_id: str) -> Backlog | None:
        """A request that runs."""
        for session in self._all:
            stream = session.streams.get(request_id)
            if stream is not None:
                return stream
        return None

    def log_names(self, request_id: str) -> dict[str, str]:
        """What a request, and its trace if it has one, is called in logs."""
        for session in self._all:
            if request_id in session.streams or request_id in session.stopping:
                return session.log_names(request_id)
        return {"request": client_name_of(request_id)}

    def emit(self, step: Sequence[tuple[str, Delta]], now_ns: int) -> Sequence[StreamOrder]:
        """Deltas of one engine step; each session takes its own."""
        return _together(session.emit(step, now_ns) for session in self._all)

    def emit_columns(self, step: Columns, now_ns: int) -> Sequence[StreamOrder]:
        """A step's plain tokens; each session takes its own."""
        return _together(session.emit_columns(step, now_ns) for session in self._all)

    def succeed(self, request_id: str, result: object, now_ns: int) -> Sequence[StreamOrder]:
        """End a unary request with its result."""
        return _together(session.succeed(request_id, result, now_ns) for session in self._all)

    def fail(self, request_id: str, error: FabricError, now_ns: int) -> None:
        """End a request whose engine has given up on it."""
        for session in self._all:
            session.fail(request_id, error, now_ns)

    def stopped(self, request_id: str, now_ns: int) -> Sequence[StreamOrder]:
        """The engine does nothing more for a request that was to stop."""
        return _together(session.stopped(request_id, now_ns) for session in self._all)

    def mark_exact(self, request_id: str) -> None:
        """Another worker would draw the same text."""
        for session in self._all:
            session.mark_exact(request_id)

    def open_choices(self, request_id: str) -> list[int]:
        """The choices of a running request that have not ended."""
        return [choice for session in self._all for choice in session.open_choices(request_id)]

    def flush(self, now_ns: int) -> Sequence[StreamOrder]:
        """Turn what changed into messages."""
        orders = _together(session.flush() for session in self._all)
        self.settle(now_ns)
        return orders

    def settle(self, now_ns: int) -> None:
        """Tell controllers which slots are for them, where that has changed."""
        if len(self._all) > 1:
            for session in self._all:
                session.share(now_ns)

    @property
    def streams(self) -> dict[str, Backlog]:
        """What runs, by name of the request."""
        return {name: stream for session in self._all for name, stream in session.streams.items()}

    # ── as one session sees the others ──────────────────────────────────────────────────────────────────────────────

    def holder_of(self, request_id: str, besides: WorkerStreams) -> WorkerStreams | None:
        """Which of the others has a request, whatever becomes of it."""
        if len(self._all) == 1:
            return None
        return next((session for session in self._all if session is not besides and session.has(request_id)), None)

    def answer_of(self, request_id: str) -> Backlog | None:
        """What any of them has of an answer."""
        found = (session.answer_of(request_id) for session in self._all)
        return next((stream for stream in found if stream is not None), None)

    def elsewhere(self, session: WorkerStreams) -> int:
        """Slots that are not for this controller: what the others use, and what they are to have.

        Where clients wait at several controllers, each is to have a share of the slots by how many wait there, as one controller
        that knew of all would give them turns. What does not divide goes around.
        """
        if len(self._all) == 1:
            return 0
        slots = self.load.slots
        others = sum([other.held for other in self._all if other is not session])
        rivals = [other for other in self._all if other.wanting and other is not session]
        if not rivals:
            return min(slots, others)
        sharing = [other for other in self._all if other.wanting or other is session]
        fixed = sum([other.held for other in self._all if other not in sharing])
        share = self._share_of(session, sharing, max(0, slots - fixed))
        return min(slots, max(others, slots - share))

    def _share_of(self, session: WorkerStreams, sharing: list[WorkerSession], pool: int) -> int:
        first = self._turn % len(sharing)
        total, before = sum([max(1, other.wanting) for other in sharing]), 0
        for other in sharing[first:] + sharing[:first]:
            after = before + max(1, other.wanting)
            if other is session:
                return pool * after // total - pool * before // total
            before = after
        return 0

    def freed(self, session: WorkerStreams, now_ns: int) -> None:
        """A request of a controller has ended: where others wait, it must not have the slot again before it is their turn."""
        if len(self._all) == 1 or not any(other.wanting for other in self._all if other is not session):
            return
        self._turn += 1
        assert isinstance(session, WorkerSession)
        if session.registered and self.elsewhere(session) > session.told_elsewhere:
            session.report(now_ns)


def _together(groups: Iterable[Sequence[StreamOrder]]) -> Sequence[StreamOrder]:
    """What the driver has to do for all of them."""
    first: Sequence[StreamOrder] = ()
    for group in groups:
        if group:
            first = [*first, *group] if first else group
    return first
