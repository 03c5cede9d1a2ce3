"""The worker's side of the protocol as a pure machine: session, beats, drain, and the streams of `WorkerStreams`.

`WorkerSession` is told what the link and the engine do, and collects frames to send in `outbox`; the driver performs
them. What the driver has to do itself comes back as `Order`s from every call that may lead to one.

The engine never waits for the network: deltas go into each stream's backlog, and leave as far as link and credit allow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from zfabric import limits
from zfabric.core.spans import Spans
from zfabric.core.timers import Timer
from zfabric.core.worker.observer import WorkerObserver
from zfabric.core.worker.orders import Begin, Spoiled, Stop, client_name_of, name_of
from zfabric.core.worker.packing import carried_of, key_of, pack_carried, pack_hello, pack_located
from zfabric.core.worker.reports import WorkerReports
from zfabric.core.worker.siblings import Siblings
from zfabric.core.worker.spans import StreamSpan
from zfabric.errors import ConfigurationError, FabricError, ProtocolError, WorkerDrainingError, from_wire
from zfabric.ids import milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.load import Load
from zfabric.wire.messages import Dispatch, Goodbye, Locate, ModelInfo, Welcome, WorkerHello
from zfabric.wire.plain import ENCODING_ERRORS, encode_plain

__all__ = [
    "Begin",
    "DrainAsked",
    "DrainWithdrawn",
    "Faulted",
    "Order",
    "Refused",
    "Registered",
    "Spoiled",
    "Stop",
    "WorkerSession",
]

_models: Final = msgspec.msgpack.Decoder(list[ModelInfo])


class Registered(NamedTuple):
    """The controller accepted this worker."""

    welcome: Welcome


class Refused(NamedTuple):
    """The controller refused this worker. It is tried again where `error.retryable`."""

    error: FabricError


class Faulted(NamedTuple):
    """The controller could not use a message of this worker; the session goes on."""

    error: FabricError


class DrainAsked(NamedTuple):
    """An operator wants the worker to finish and leave."""

    limit_ms: int


class DrainWithdrawn(NamedTuple):
    """An operator wants it to stay after all."""


Order = Begin | Stop | Spoiled | Registered | Refused | Faulted | DrainAsked | DrainWithdrawn


class WorkerSession(WorkerReports):
    """Protocol state of one worker.

    Args:
        name: Unique name; `instance` tells its runs apart.
        speed, beats: As announced.
        stream_interval: Units gathered into one chunk after the first one.
        rng: Chance, for jitter.
        load, observer, siblings: As of `StreamTables`.
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
        load: Load | None = None,
        observer: WorkerObserver | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        super().__init__(name, stream_interval, load, observer, siblings)
        self.instance = instance
        self.build = build
        self.speed = speed
        self.beats = beats
        #: None until the first `announce`: nothing is loaded yet, so there is nothing to say HELLO with.
        self.models: list[ModelInfo] | None = None
        #: Of the controller, while there is a session.
        self.epoch = 0
        self._rng = rng
        self._token = b""
        self._connected = False
        self._connections = 0
        self._asked = False
        self._announced: list[ModelInfo] | None = None
        self._told: set[tuple[int, int, int]] = set()
        self._beat_ms = limits.BEAT_MS
        self._hello_timer: Timer | None = None
        self._beat_timer: Timer | None = None

    # ── link ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, now_ns: int) -> None:
        """The link is up. The first HELLO leaves at once, later ones with jitter: a controller that restarts must not
        meet all its workers in one millisecond."""
        self.disconnected()
        self._connected = True
        self._connections += 1
        delay_ms = 0.0 if self._connections == 1 else self._rng.uniform(0, limits.HELLO_JITTER_MS)
        self._say_hello_in(now_ns, delay_ms)

    def disconnected(self) -> None:
        """The link is down. Engines go on; what they make waits in the backlogs."""
        self._connected = self._asked = False
        self._end_session()

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        self.timers.now_ns = self._now_ns = now_ns
        self.timers.run(now_ns)

    def trace(self) -> Spans[StreamSpan]:
        """Note from now on what traces are told. Returns where that is collected."""
        self.observer.spans = spans = Spans[StreamSpan](self._rng)
        return spans

    def log_names(self, request_id: str) -> dict[str, str]:
        """What a request, and its trace if it has one, is called in logs."""
        entry = self.stopping.get(request_id)
        stream = self.streams.get(request_id) if entry is None else entry.stream
        names = {"request": client_name_of(request_id)}
        if stream is not None and stream.trace is not None:
            names["trace"] = f"{stream.trace.trace_id:032x}"
        return names

    def announce(self, models: Sequence[ModelInfo], now_ns: int) -> None:
        """Set what is served, which may be nothing; a registered worker tells the controller at once.

        Raises:
            ConfigurationError: It cannot be announced; what was announced before stays.
        """
        self.models = self._announceable(models)
        self._cached.forget(info.name for info in self.models)
        if self.registered:
            self._hello(now_ns)

    def drain(self, now_ns: int) -> None:
        """Take nothing new. The controller knows with the next load report, which leaves now."""
        self.draining = True
        self.load.draining = True
        self.report(now_ns)

    def undrain(self, now_ns: int) -> None:
        """Take requests again, which the controller knows with the load report that leaves now."""
        self.draining = self.load.draining = False
        self.report(now_ns)

    def goodbye(self, reason: str) -> None:
        """Leave. What still runs is handed back."""
        for request_id in list(self.streams):
            self.fail(request_id, WorkerDrainingError(f"worker {self.name!r} leaves", worker=self.name), self._now_ns)
        self.flush()
        if self._connected:
            self.outbox.append(codec.pack(Goodbye(reason)))

    @property
    def empty(self) -> bool:
        """Whether it knows of no request."""
        return not (self.streams or self.stopping or len(self._kept))

    def expire(self, now_ns: int) -> None:
        """Forget finished answers that have waited for long enough."""
        self._kept.expire(now_ns)

    def _end_session(self) -> None:
        self.registered = False
        self.tell_nothing()
        self.timers.cancel(self._hello_timer)
        self.timers.cancel(self._beat_timer)
        self.forget_readers()

    def _say_hello_in(self, now_ns: int, delay_ms: float) -> None:
        self.timers.cancel(self._hello_timer)
        if delay_ms:
            self._hello_timer = self.timers.at(now_ns + milliseconds(delay_ms), self._hello)
        else:
            self._hello(now_ns)

    def _hello(self, now_ns: int) -> None:
        if not self._connected or self.models is None:
            return
        self._asked = True
        self._announced = self.models
        # A standing session's HELLO carries all as well: the controller may have ended that session, and the word of it may
        # be on its way. Then this one begins the next.
        carried = self.carried()
        frames, self._told = pack_hello(self._hello_of(self.models, self._elsewhere()), carried)
        self.outbox.append(frames)
        if self.registered:
            if len(self._told) < len(carried):
                self.report(now_ns)
            return
        retry_ms = limits.HELLO_RETRY_MS * self._rng.uniform(0.75, 1.25)
        self._hello_timer = self.timers.at(now_ns + milliseconds(retry_ms), self._hello)

    def _hello_of(self, models: list[ModelInfo], elsewhere: int = 0) -> WorkerHello:
        return WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build=self.build,
            name=self.name,
            instance=self.instance,
            models=models,
            load=self._load_for(elsewhere),
            speed=self.speed,
            beats=self.beats,
            token=self._token,
            minor=kinds.MINOR_VERSION,
        )

    def _announceable(self, models: Sequence[ModelInfo]) -> list[ModelInfo]:
        """Models as the controller will read them. Raises: ConfigurationError: It would not take them."""
        try:
            known = _models.decode(encode_plain(list(models)))
            frames, _ = pack_hello(self._hello_of(known), [])
            codec.unpack_control(frames[0])
        except (*ENCODING_ERRORS, FabricError) as error:
            raise ConfigurationError(f"the models cannot be announced: {error}", worker=self.name) from None
        return known

    def _beat(self, now_ns: int) -> None:
        self._kept.expire(now_ns)
        if self.beats:
            self.report(now_ns)
        self._beat_timer = self.timers.at(now_ns + milliseconds(self._beat_ms), self._beat)

    # ── from the controller ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, header: bytes, body: bytes, now_ns: int) -> Sequence[Order]:
        """Handle one message. Returns what the driver has to do.

        Raises:
            ProtocolError: The message makes no sense, and names no request; the caller counts and forgets it.
        """
        self.timers.now_ns = self._now_ns = now_ns
        kind = header[0] if header else -1
        if body and kind not in kinds.WITH_BODY:
            raise ProtocolError(f"kind {kind} has no second frame", kind=kind)
        if kind in _OF_A_SESSION:
            # Of a former connection if there is none: libzmq may deliver it after the news that the connection is gone.
            if not self.registered:
                return ()
            self._of_a_session(kind, header, body, now_ns)
            return self.flush()
        if kind == kinds.BEAT:
            # Number 0 is a question; the others are answers.
            beat = codec.unpack_control(header)
            self.wanted(beat.wanting, now_ns)
            if not beat.number:
                self.report(now_ns, streams=beat.streams)
            return ()
        if kind == kinds.WELCOME:
            return self._welcome(codec.unpack_control(header), now_ns)
        if kind == kinds.DRAIN:
            drain = codec.unpack_control(header)
            return [DrainWithdrawn() if drain.withdrawn else DrainAsked(drain.limit_ms)]
        if kind == kinds.UNKNOWN_SESSION:
            # The controller does not know this connection: it has restarted, or took this worker for dead.
            self._start_over(now_ns, self._rng.uniform(0, limits.HELLO_JITTER_MS) or 1)
            return ()
        if kind in (kinds.REFUSED, kinds.FAULT):
            return self._refused(kind, header, now_ns)
        if kind == kinds.GOODBYE:
            # The controller stops: keep everything for the next one, which the link will find.
            self._start_over(now_ns, limits.HELLO_RETRY_MS)
            return ()
        raise ProtocolError(f"kind {kind} is not a message to a worker", kind=kind)

    def _of_a_session(self, kind: int, header: bytes, body: bytes, now_ns: int) -> None:
        if kind == kinds.DISPATCH:
            self._dispatches += 1
            envelope = self._readable(header)
            if envelope is not None:
                self.dispatched(envelope, body, now_ns)
        elif kind == kinds.GRANT:
            self.granted(codec.unpack_control(header))
        elif kind == kinds.LOCATE:
            self._locate(codec.unpack_control(header))
        else:
            self.aborted(codec.unpack_control(header))

    def _locate(self, locate: Locate) -> None:
        """A client may have come from another controller: say what there is of what it waits for."""
        find = self.answer_of if self._siblings is None else self._siblings.answer_of
        names = (name_of(locate.instance, request, attempt) for request, attempt in locate.attempts)
        self.outbox += pack_located(locate.number, [carried_of(it) for name in names if (it := find(name)) is not None])

    def _readable(self, header: bytes) -> Dispatch | None:
        """The envelope of a DISPATCH. One that does not decode ends the attempt that it names.

        Raises:
            ProtocolError: It names none.
        """
        try:
            envelope: Dispatch = codec.unpack_envelope(header)
        except ProtocolError as error:
            numbers = codec.leading_integers(memoryview(header)[1:], 4)
            if len(numbers) < 4 or max(numbers) >= 2**63 or numbers[3] > limits.ATTEMPTS_MAX:
                raise
            self._tell(numbers[1], numbers[2], numbers[3], error)
            return None
        return envelope

    def _refused(self, kind: int, header: bytes, now_ns: int) -> Sequence[Order]:
        fault = codec.unpack_control(header)
        error = from_wire(fault.code, fault.message, fault.details)
        if kind == kinds.FAULT:
            return [Faulted(error)]
        if self.registered:
            # The session that there was is over.
            self._start_over(now_ns, limits.HELLO_RETRY_MS)
        return [Refused(error)]

    def _welcome(self, welcome: Welcome, now_ns: int) -> Sequence[Order]:
        if self.registered or not self._asked:
            return ()
        if welcome.beat_ms < 1:
            raise ProtocolError(f"beat_ms of a WELCOME is {welcome.beat_ms}, it must be at least 1")
        self.timers.cancel(self._hello_timer)
        self.registered = True
        self._token = welcome.token
        self._beat_ms = welcome.beat_ms
        self._frame_bytes_max = min(welcome.frame_bytes_max, limits.FRAME_BYTES_MAX)
        self._frame_goal = min(welcome.frame_bytes_max, limits.FRAME_BYTES_GOAL)
        self._dispatches = 0
        self._kept.restart(now_ns)
        self._minor, self.epoch = welcome.minor, welcome.epoch
        self._cached.again()
        self._tell_cached_later(now_ns)
        untold = pack_carried([line for line in self.carried() if key_of(line) not in self._told])
        self._told.clear()
        self.outbox += untold
        if untold or self.told_elsewhere:
            # The HELLO offered no slots, or those alone that others leave.
            self.report(now_ns)
        self.timers.cancel(self._beat_timer)
        # A random phase, or a thousand workers beat in step for ever after a restart.
        phase_ms = self._beat_ms * self._rng.random()
        self._beat_timer = self.timers.at(now_ns + milliseconds(phase_ms), self._beat)
        if self.models is not self._announced:
            # They changed while the HELLO was on its way.
            self._hello(now_ns)
        return [Registered(welcome)]

    def _start_over(self, now_ns: int, delay_ms: float) -> None:
        """The session is over, the connection is not. Without one a HELLO is on its way already, whose answer counts."""
        if self.registered:
            self._end_session()
            self._say_hello_in(now_ns, delay_ms)


#: What makes sense within a session alone.
_OF_A_SESSION: Final = frozenset({kinds.DISPATCH, kinds.GRANT, kinds.ABORT, kinds.LOCATE})
