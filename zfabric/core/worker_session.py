"""The worker's side of the protocol as a pure machine: session, streams, credit, beats, drain.

`WorkerSession` is told what the link and the engine do, and collects frames to send in `outbox`; the driver performs
them. What the engine has to do comes back from `receive` as `Order`s.

The engine never waits for the network: deltas go into each stream's backlog, and leave as far as link and credit allow.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zfabric import limits
from zfabric.core.backlog import Backlog
from zfabric.core.timers import Timer, Timers
from zfabric.errors import FabricError, ProtocolError, RequestCancelledError, WorkerDrainingError, from_wire
from zfabric.ids import milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.messages import (
    Abort,
    Carried,
    Dispatch,
    End,
    Ends,
    Goodbye,
    Grant,
    Load,
    ModelInfo,
    Welcome,
    WorkerHello,
)
from zfabric.wire.payloads import AnyRequest, Chunk, Delta, EndsBody, GenerateRequest, Outcome


class Begin(NamedTuple):
    """Start this request."""

    request_id: str
    operation: str
    request: AnyRequest


class Stop(NamedTuple):
    """Stop this request; nothing more is wanted of it."""

    request_id: str


class Registered(NamedTuple):
    """The controller accepted this worker."""

    welcome: Welcome


class Refused(NamedTuple):
    """The controller refused this worker. It is tried again where `error.retryable`."""

    error: FabricError


class DrainAsked(NamedTuple):
    """An operator wants the worker to finish and leave."""

    limit_ms: int


Order = Begin | Stop | Registered | Refused | DrainAsked


class WorkerSession:
    """Protocol state of one worker.

    Args:
        name: Unique name; `instance` tells its runs apart.
        speed, beats: As announced.
        stream_interval: Units gathered into one chunk after the first one.
        rng: Chance, for jitter.
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
        self.name = name
        self.instance = instance
        self.build = build
        self.speed = speed
        self.beats = beats
        self.models: list[ModelInfo] = []
        self.load = Load()
        self.outbox: list[codec.Frames] = []
        self.timers = Timers()
        self.streams: dict[str, Backlog] = {}
        self.registered = False
        self.draining = False
        self._stream_interval = stream_interval
        self._rng = rng
        self._token = b""
        self._connected = False
        self._connections = 0
        self._beat_ms = limits.BEAT_MS
        self._hello_timer: Timer | None = None
        self._beat_timer: Timer | None = None
        self._dispatches = 0
        self._finished: dict[str, Backlog] = {}
        self._finished_bytes = 0
        self._dirty: dict[str, Backlog] = {}

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
        self._connected = self.registered = False
        self.timers.cancel(self._hello_timer)
        self.timers.cancel(self._beat_timer)
        for stream in self.streams.values():
            stream.client = None
        for stream in self._finished.values():
            stream.client = None
        self._dirty.clear()

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        self.timers.now_ns = now_ns
        self.timers.run(now_ns)

    def announce(self, models: Sequence[ModelInfo], now_ns: int) -> None:
        """Set what is served; a registered worker tells the controller at once."""
        self.models = list(models)
        if self.registered:
            self._hello(now_ns)

    def drain(self, now_ns: int) -> None:
        """Take nothing new. The controller knows with the next load report, which leaves now."""
        self.draining = True
        self.load.draining = True
        self.report(now_ns)

    def goodbye(self, reason: str) -> None:
        """Leave. What still runs is handed back."""
        for stream in list(self.streams.values()):
            self.fail(stream.request_id, WorkerDrainingError(f"worker {self.name!r} leaves", worker=self.name), 0)
        self.flush()
        if self._connected:
            self.outbox.append(codec.pack(Goodbye(reason)))

    def report(self, now_ns: int) -> None:
        """Send the load now, if anybody listens."""
        if not self.registered:
            return
        self.load.dispatches = self._dispatches
        self.load.running = max(0, len(self.streams) - self.load.waiting)
        self.outbox.append(codec.pack(self.load))

    def _say_hello_in(self, now_ns: int, delay_ms: float) -> None:
        self.timers.cancel(self._hello_timer)
        if delay_ms:
            self._hello_timer = self.timers.at(now_ns + milliseconds(delay_ms), self._hello)
        else:
            self._hello(now_ns)

    def _hello(self, now_ns: int) -> None:
        if not self._connected or not self.models:
            return
        carried: list[Carried] = []
        if not self.registered:
            carried = [_carried(stream) for stream in (*self.streams.values(), *self._finished.values())]
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build=self.build,
            name=self.name,
            instance=self.instance,
            models=self.models,
            load=self.load,
            speed=self.speed,
            beats=self.beats,
            token=self._token,
            carried=carried,
        )
        self.outbox.append(codec.pack(hello))
        if not self.registered:
            retry_ms = limits.HELLO_RETRY_MS * self._rng.uniform(0.75, 1.25)
            self._hello_timer = self.timers.at(now_ns + milliseconds(retry_ms), self._hello)

    def _beat(self, now_ns: int) -> None:
        self._expire_finished(now_ns)
        self.report(now_ns)
        self._beat_timer = self.timers.at(now_ns + milliseconds(self._beat_ms), self._beat)

    # ── from the controller ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, header: bytes, body: bytes, now_ns: int) -> list[Order]:
        """Handle one message. Returns what the engine has to do.

        Raises:
            ProtocolError: The message makes no sense; the caller counts and forgets it.
        """
        self.timers.now_ns = now_ns
        kind = header[0] if header else -1
        if kind == kinds.DISPATCH:
            if not self.registered:
                # Of a former connection: libzmq may deliver it after the news that the connection is gone.
                return []
            return self._dispatch(codec.unpack_envelope(header), body, now_ns)
        if kind == kinds.BEAT:
            # Number 0 is a question; the others are answers.
            if not codec.unpack_control(header).number:
                self.report(now_ns)
            return []
        if kind == kinds.GRANT:
            return self._grant(codec.unpack_control(header), now_ns)
        if kind == kinds.ABORT:
            return self._abort(codec.unpack_control(header), now_ns)
        if kind == kinds.WELCOME:
            return self._welcome(codec.unpack_control(header), now_ns)
        if kind == kinds.DRAIN:
            return [DrainAsked(codec.unpack_control(header).limit_ms)]
        if kind == kinds.UNKNOWN_SESSION:
            self._start_over(now_ns)
            return []
        if kind in (kinds.REFUSED, kinds.FAULT):
            fault = codec.unpack_control(header)
            error = from_wire(fault.code, fault.message, fault.details)
            return [Refused(error)] if kind == kinds.REFUSED else []
        if kind == kinds.GOODBYE:
            # The controller stops: keep everything for the next one, which the link will find.
            self.disconnected()
            self._connected = True
            self._say_hello_in(now_ns, limits.HELLO_RETRY_MS)
            return []
        raise ProtocolError(f"kind {kind} is not a message to a worker", kind=kind)

    def _welcome(self, welcome: Welcome, now_ns: int) -> list[Order]:
        self.timers.cancel(self._hello_timer)
        if self.registered:
            return []
        self.registered = True
        self._token = welcome.token
        self._beat_ms = welcome.beat_ms
        self._dispatches = 0
        for stream in self._finished.values():
            stream.finished_ns = now_ns
        self.timers.cancel(self._beat_timer)
        if self.beats:
            # A random phase, or a thousand workers beat in step for ever after a restart.
            phase_ms = self._beat_ms * self._rng.random()
            self._beat_timer = self.timers.at(now_ns + milliseconds(phase_ms), self._beat)
        return [Registered(welcome)]

    def _start_over(self, now_ns: int) -> None:
        """The controller does not know this connection: it has restarted, or took this worker for dead."""
        if self._connected:
            self.disconnected()
            self._connected = True
            self._say_hello_in(now_ns, self._rng.uniform(0, limits.HELLO_JITTER_MS) or 1)

    def _dispatch(self, envelope: Dispatch, body: bytes, now_ns: int) -> list[Order]:
        self._dispatches += 1
        request_id = f"{envelope.instance:x}-{envelope.request:x}-{envelope.attempt}"
        stream = Backlog(
            request_id=request_id,
            client=envelope.client,
            instance=envelope.instance,
            request=envelope.request,
            attempt=envelope.attempt,
            operation=envelope.operation,
            model=envelope.model,
            window=envelope.window,
            resume_from=envelope.resume_from,
            choices=1,
        )
        if request_id in self.streams:
            return []
        self.streams[request_id] = stream
        try:
            if self.draining and envelope.operation != "operate":
                raise WorkerDrainingError(f"worker {self.name!r} is draining", worker=self.name)
            request = codec.unpack_request(envelope.operation, body)
            request.validate()
        except FabricError as error:
            self.fail(request_id, error, now_ns)
            self.flush()
            return []
        if isinstance(request, GenerateRequest):
            stream.open_choices = request.sampling.n
        request.model, request.request_id = envelope.model, request_id
        request.priority, request.deadline_ms = envelope.priority, envelope.deadline_ms
        return [Begin(request_id, envelope.operation, request)]

    def _grant(self, grant: Grant, now_ns: int) -> list[Order]:
        orders: list[Order] = []
        for line in grant.lines:
            request_id = f"{grant.instance:x}-{line.request:x}-{line.attempt}"
            stream = self.streams.get(request_id) or self._finished.get(request_id)
            if stream is None:
                continue
            stream.window = max(stream.window, line.window)
            if line.again:
                stream.client = grant.client
                if not stream.rewind(line.next):
                    orders.append(Stop(request_id))
                    self._lose(stream, line.next, now_ns)
            else:
                stream.acknowledge(line.next)
            self._dirty[request_id] = stream
        self.flush()
        return orders

    def _lose(self, stream: Backlog, units: int, now_ns: int) -> None:
        """The reader lacks something that is gone: end the stream, the client begins again."""
        stream.deltas.clear()
        stream.sent = 0
        stream.first = stream.next = stream.end = units
        error = WorkerDrainingError(f"worker {self.name!r} no longer has unit {units}", worker=self.name)
        stream.finish(error.code, Outcome(message=error.message, details=error.details), now_ns)
        self.streams.pop(stream.request_id, None)
        self._keep(stream)

    def _abort(self, abort: Abort, now_ns: int) -> list[Order]:
        orders: list[Order] = []
        for request, attempt in abort.attempts:
            request_id = f"{abort.instance:x}-{request:x}-{attempt}"
            if request_id in self.streams:
                orders.append(Stop(request_id))
                self.fail(request_id, RequestCancelledError("cancelled"), now_ns, deliver=False)
            stale = self._finished.pop(request_id, None)
            if stale is not None:
                self._finished_bytes -= stale.bytes_kept
            # The controller waits for this word to use the slot again, whether or not anything ran.
            self._tell_stopped(abort.instance, request, attempt)
        return orders

    def _tell_stopped(self, instance: int, request: int, attempt: int) -> None:
        error = RequestCancelledError("cancelled")
        envelope = Ends(instance=instance, ends=[End(request=request, attempt=attempt, code=error.code)])
        body = EndsBody(outcomes=[Outcome(message=error.message)])
        self.outbox.append((codec.pack_envelope(envelope), codec.encode(body)))

    # ── from the engine ─────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, step: Iterable[tuple[str, Delta]], now_ns: int) -> None:
        """Deltas of one engine step. They leave with the next `flush`."""
        streams, dirty = self.streams, self._dirty
        for request_id, delta in step:
            stream = streams.get(request_id)
            if stream is None:
                continue
            stream.add(delta)
            dirty[request_id] = stream
            if stream.open_choices <= 0:
                usage = stream.usage(delta.usage, 0)
                self._finish(stream, 0, Outcome(usage=usage), now_ns)

    def succeed(self, request_id: str, result: object, now_ns: int) -> None:
        """End a unary request with its result."""
        stream = self.streams.get(request_id)
        if stream is not None:
            self._finish(stream, 0, Outcome(result=codec.raw(result)), now_ns)

    def fail(self, request_id: str, error: FabricError, now_ns: int, *, deliver: bool = True) -> None:
        """End a request with an error. Unknown requests have ended already."""
        stream = self.streams.get(request_id)
        if stream is None:
            return
        usage = stream.usage(None, 0) if stream.operation == "generate" else None
        outcome = Outcome(usage=usage, message=error.message, details=error.details)
        if deliver:
            self._finish(stream, error.code, outcome, now_ns)
        else:
            del self.streams[request_id]
            self._dirty.pop(request_id, None)

    def _finish(self, stream: Backlog, code: int, outcome: Outcome, now_ns: int) -> None:
        stream.finish(code, outcome, now_ns)
        del self.streams[stream.request_id]
        self._dirty[stream.request_id] = stream
        self._keep(stream)

    def _keep(self, stream: Backlog) -> None:
        """Keep a finished answer for a reader whose controller may just be dying."""
        if stream.request_id not in self._finished:
            self._finished[stream.request_id] = stream
            self._finished_bytes += stream.bytes_kept
        while self._finished_bytes > limits.FINISHED_BYTES_MAX and len(self._finished) > 1:
            self._drop_oldest()

    def _expire_finished(self, now_ns: int) -> None:
        horizon_ns = now_ns - milliseconds(limits.FINISHED_MS)
        while self._finished and next(iter(self._finished.values())).finished_ns < horizon_ns:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self._finished.pop(next(iter(self._finished)))
        self._finished_bytes -= oldest.bytes_kept

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def flush(self) -> None:
        """Turn what changed into messages: one per client, whatever the number of streams."""
        if not self._dirty or not self.registered:
            self._dirty.clear()
            return
        dirty, self._dirty = self._dirty, {}
        interval, name = self._stream_interval, self.name
        chunks: dict[int, list[Chunk]] = {}
        ends: dict[int, list[Backlog]] = {}
        for stream in dirty.values():
            client = stream.client
            if client is None:
                continue
            if stream.outcome is not None:
                ends.setdefault(client, []).append(stream)
            elif stream.end - stream.next < interval and stream.next != stream.resumed:
                continue
            taken = stream.take(name)
            lines = chunks.get(client)
            if lines is None:
                # A terminal needs its list even where nothing is left to send before it.
                if taken or stream.outcome is not None:
                    chunks[client] = taken
            else:
                lines += taken
        for client, lines in chunks.items():
            finished = ends.get(client)
            if finished is None:
                self.outbox.append(codec.pack_chunks(client, lines))
            else:
                self.outbox.append(_ends_message(finished, lines))


def _ends_message(finished: list[Backlog], chunks: list[Chunk]) -> codec.Frames:
    lines = [End(request=stream.request, attempt=stream.attempt, code=stream.code or 0) for stream in finished]
    outcomes = [stream.outcome for stream in finished if stream.outcome is not None]
    envelope = Ends(instance=finished[0].instance, ends=lines, client=finished[0].client or 0)
    return codec.pack_envelope(envelope), codec.encode(EndsBody(chunks=chunks, outcomes=outcomes))


def _carried(stream: Backlog) -> Carried:
    return Carried(
        instance=stream.instance,
        request=stream.request,
        attempt=stream.attempt,
        operation=stream.operation,
        model=stream.model,
        finished=stream.finished,
    )
