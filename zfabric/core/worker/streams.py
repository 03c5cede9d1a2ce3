"""The requests of a worker: what runs, what is being stopped, and what has finished and may still be asked for.

Deltas go into each stream's backlog, and leave as far as the session and the reader's credit allow. A terminal frees the
request's slot at the controller. So a request that is to stop while its engine runs waits in `stopping` until the driver
says that the engine has stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple

from zfabric import limits
from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.kept import KeptAnswers
from zfabric.core.worker.observer import WorkerObserver
from zfabric.core.worker.orders import Begin, Columns, Spoiled, Stop, StreamOrder, name_of
from zfabric.core.worker.packing import Packing, carried_of, pack_whole
from zfabric.core.worker.soundness import outcome_of, outcome_with
from zfabric.errors import BackendError, FabricError, RequestCancelledError, WorkerDrainingError, WorkerLostError
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.bounds import check_request
from zfabric.wire.chunks import Chunks, EndsBody
from zfabric.wire.flow import Abort, CreditLine, Grant
from zfabric.wire.load import StreamUnits
from zfabric.wire.messages import Carried, Dispatch, End, Ends
from zfabric.wire.payloads import Delta, TextRequest
from zfabric.wire.plain import ENCODING_ERRORS

#: An upper bound of what `StreamUnits` takes.
_UNITS_BYTES: Final = 28


class _Stopping(NamedTuple):
    """A request whose engine is to stop, and the error that it ends with then."""

    stream: Backlog
    error: FabricError


class WorkerStreams:
    """All requests that a worker knows.

    Args:
        name: The worker's name.
        stream_interval: Units gathered into one chunk after the first one.

    Attributes:
        outbox: Messages to send, in order.
        streams: What runs, by name of the request.
        stopping: What is to stop, and still has its slot.
        registered: Whether there is a session.
        draining: Whether new requests are handed back.
        observer: Is told what happens to requests.
    """

    def __init__(self, name: str, stream_interval: int) -> None:
        self.name = name
        self.outbox: list[codec.Frames] = []
        self.streams: dict[str, Backlog] = {}
        self.stopping: dict[str, _Stopping] = {}
        self.registered = False
        self.draining = False
        self.observer = WorkerObserver(name)
        #: The time of the event that is being handled.
        self._now_ns = 0
        self._stream_interval = stream_interval
        self._frame_bytes_max = limits.FRAME_BYTES_MAX
        self._frame_goal = limits.FRAME_BYTES_GOAL
        self._kept = KeptAnswers()
        self._dirty: dict[str, Backlog] = {}
        self._orders: list[StreamOrder] = []

    @property
    def busy(self) -> bool:
        """Whether any request holds a slot."""
        return bool(self.streams or self.stopping)

    def carried(self) -> list[Carried]:
        """All that another controller has to know of: what runs, what still stops, and what may have a reader."""
        stopping = [entry.stream for entry in self.stopping.values()]
        return [carried_of(stream) for stream in (*self.streams.values(), *stopping, *self._kept)]

    def units_made(self) -> list[StreamUnits]:
        """How far each stream is; as many as leave room for the rest of a load report. A client may say that it has more units
        than can be told."""
        most = min(limits.SLOTS_MAX, limits.CONTROL_BODY_BYTES_MAX // 2 // _UNITS_BYTES)
        return [
            StreamUnits(instance=it.instance, request=it.request, attempt=it.attempt, units=min(it.end, 2**32 - 1))
            for it in islice(self.streams.values(), most)
        ]

    def forget_readers(self) -> None:
        """There is no session: nobody is known to read, until the next controller says who does."""
        stopping = [entry.stream for entry in self.stopping.values()]
        for stream in (*self.streams.values(), *stopping, *self._kept):
            stream.client = None
        self._dirty.clear()

    # ── from the controller ─────────────────────────────────────────────────────────────────────────────────────────

    def dispatched(self, envelope: Dispatch, body: bytes, now_ns: int) -> None:
        """Take a request, or end it at once with the reason. An attempt runs once, however often it comes."""
        request_id = name_of(envelope.instance, envelope.request, envelope.attempt)
        if request_id in self.streams or request_id in self.stopping:
            return
        kept = self._kept.get(request_id)
        if kept is not None:
            kept.client, kept.window = envelope.client, max(kept.window, envelope.window)
            self._send_again(kept, envelope.resume_from)
            return
        stream = self.streams[request_id] = Backlog(
            request_id=request_id,
            client=envelope.client,
            instance=envelope.instance,
            request=envelope.request,
            attempt=envelope.attempt,
            operation=envelope.operation,
            model=envelope.model,
            window=envelope.window,
            resume_from=envelope.resume_from,
            lock=envelope.lock,
        )
        self.observer.came(stream, envelope, len(body), now_ns)
        try:
            if self.draining and envelope.operation != "operate":
                raise WorkerDrainingError(f"worker {self.name!r} is draining", worker=self.name)
            check_request(body)
            request = codec.unpack_request(envelope.operation, body)
            request.validate()
        except FabricError as error:
            self._fail(stream, error, now_ns)
            return
        if isinstance(request, TextRequest):
            stream.expect(request.sampling.n)
        request.model, request.request_id = envelope.model, request_id
        request.priority, request.deadline_ms = envelope.priority, envelope.deadline_ms
        if stream.span is not None:
            stream.span.engine_ns = now_ns
        self._orders.append(Begin(request_id, envelope.operation, request, stream.trace))

    def granted(self, grant: Grant) -> None:
        """Take credit, and send again what a reader that came another way lacks."""
        for line in grant.lines:
            request_id = name_of(grant.instance, line.request, line.attempt)
            stream = self.streams.get(request_id) or self._kept.get(request_id)
            if stream is not None:
                self._granted_one(stream, grant.client, line)
            elif request_id in self.stopping:
                self._granted_late(self.stopping[request_id].stream, grant.client, line)
            elif line.again:
                # It was matched by what this worker carried a moment ago: the reader must not wait for it.
                gone = WorkerLostError(f"worker {self.name!r} no longer has the answer", worker=self.name)
                self._tell(grant.instance, line.request, line.attempt, gone)

    def _granted_one(self, stream: Backlog, client: int, line: CreditLine) -> None:
        stream.window = max(stream.window, line.window)
        if stream.held_ns:
            self.observer.released(stream, self._now_ns)
        if line.again:
            stream.client = client
            self._send_again(stream, line.next)
        else:
            stream.acknowledge(line.next)
            self._dirty[stream.request_id] = stream

    def _granted_late(self, stream: Backlog, client: int, line: CreditLine) -> None:
        """Note who reads of a request that is to stop, for when it has."""
        if line.again:
            stream.client = client
            if not stream.rewind(line.next):
                stream.clear(line.next)

    def _send_again(self, stream: Backlog, units: int) -> None:
        """Go on from this unit. What is gone cannot be sent: the client begins again, unless the answer had ended with an
        error of its own."""
        if not stream.rewind(units):
            error = WorkerLostError(f"worker {self.name!r} no longer has unit {units}", worker=self.name)
            stream.clear(units)
            if stream.request_id in self.streams:
                self._stop(stream, error)
                return
            if not stream.code:
                stream.code, stream.outcome = outcome_of(error)
        self._dirty[stream.request_id] = stream

    def aborted(self, abort: Abort) -> None:
        """Stop what is not wanted. Each gets its terminal, also where nothing runs: its slot waits for that word."""
        error = RequestCancelledError("cancelled")
        for request, attempt in abort.attempts:
            request_id = name_of(abort.instance, request, attempt)
            self._kept.drop(request_id)
            stream = self.streams.get(request_id)
            if stream is not None:
                self._stop(stream, error)
            elif request_id in self.stopping:
                self.stopping[request_id] = self.stopping[request_id]._replace(error=error)
            else:
                self._dirty.pop(request_id, None)
                self._tell(abort.instance, request, attempt, error)

    # ── from the engine ─────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, step: Iterable[tuple[str, Delta]], now_ns: int) -> Sequence[StreamOrder]:
        """Deltas of one engine step. They leave with the next `flush`.

        Returns:
            What the driver has to do: a delta that is none ends its own request.
        """
        streams, self._now_ns = self.streams, now_ns
        for request_id, delta in step:
            stream = streams.get(request_id)
            if stream is not None:
                self._add(stream, delta, now_ns)
        return self._taken_orders() if self._orders else ()

    def _add(self, stream: Backlog, delta: Delta, now_ns: int) -> None:
        """Take a delta of a running stream, which may be its last."""
        try:
            stream.add(delta)
        except Exception as error:  # noqa: BLE001 — whatever a backend handed over is that request's error
            self._spoil(stream, _as_fabric_error(error))
            return
        self._dirty[stream.request_id] = stream
        if not stream.first_ns:
            self.observer.first_unit(stream, now_ns)
        if stream.open_choices <= 0:
            self._finish(stream, 0, Outcome(usage=stream.usage(delta.usage, 0)), now_ns)

    def emit_columns(self, step: Columns, now_ns: int) -> Sequence[StreamOrder]:
        """A step's plain tokens. Returns: as `emit`."""
        streams, dirty, self._now_ns = self.streams, self._dirty, now_ns
        for request_id, token, text in zip(*step, strict=True):
            stream = streams.get(request_id)
            if stream is None:
                continue
            if stream.careful or token.__class__ is not int or text.__class__ is not str:
                self._add(stream, Delta(text=text, token_ids=[token]), now_ns)
                continue
            stream.deltas.append((text, token))
            stream.end += 1
            dirty[request_id] = stream
        return self._taken_orders() if self._orders else ()

    def succeed(self, request_id: str, result: object, now_ns: int) -> Sequence[StreamOrder]:
        """End a unary request with its result, or with an error if that cannot be sent."""
        stream = self.streams.get(request_id)
        if stream is not None:
            try:
                self._finish(stream, 0, outcome_with(result), now_ns)
            except BackendError as error:
                self._orders.append(Spoiled(request_id, error))
                self._fail(stream, error, now_ns)
        return self._taken_orders()

    def fail(self, request_id: str, error: FabricError, now_ns: int) -> None:
        """End a request whose engine has given up on it. Unknown requests have ended already."""
        stream = self.streams.get(request_id)
        if stream is not None:
            self._fail(stream, error, now_ns)

    def stopped(self, request_id: str, now_ns: int) -> Sequence[StreamOrder]:
        """The engine does nothing more for a request that was to stop: now its slot is free."""
        entry = self.stopping.pop(request_id, None)
        if entry is None:
            return ()
        stream, error = entry
        if not isinstance(error, RequestCancelledError):
            self._fail(stream, error, now_ns)
            return self.flush()
        self.observer.ended(stream, *outcome_of(error), now_ns)
        if self.registered:
            self._tell(stream.instance, stream.request, stream.attempt, error)
        return ()

    def mark_exact(self, request_id: str) -> None:
        """Another worker would draw the same text: the first chunk says so."""
        stream = self.streams.get(request_id)
        if stream is not None:
            stream.exact = True

    def open_choices(self, request_id: str) -> list[int]:
        """The choices of a running request that have not ended."""
        stream = self.streams.get(request_id)
        return [] if stream is None else [n for n in range(stream.choices) if not stream.closed >> n & 1]

    # ── endings ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stop(self, stream: Backlog, error: FabricError) -> None:
        """Have the engine stop; the terminal waits for that."""
        del self.streams[stream.request_id]
        self._dirty.pop(stream.request_id, None)
        self.stopping[stream.request_id] = _Stopping(stream, error)
        self._orders.append(Stop(stream.request_id))

    def _spoil(self, stream: Backlog, error: FabricError) -> None:
        self._orders.append(Spoiled(stream.request_id, error))
        if not stream.finished:
            self._stop(stream, error)

    def _fail(self, stream: Backlog, error: FabricError, now_ns: int) -> None:
        usage = stream.usage(None, 0) if stream.operation == "generate" else None
        code, outcome = outcome_of(error, usage)
        self._finish(stream, code, outcome, now_ns)

    def _finish(self, stream: Backlog, code: int, outcome: Outcome, now_ns: int) -> None:
        self.observer.ended(stream, code, outcome, now_ns)
        stream.finish(code, outcome, now_ns)
        self.streams.pop(stream.request_id, None)
        self._dirty[stream.request_id] = stream
        self._keep(stream)

    def _keep(self, stream: Backlog) -> None:
        """Keep a finished answer for a reader whose controller may just be dying."""
        self._kept.keep(stream)

    def _tell(self, instance: int, request: int, attempt: int, error: FabricError) -> None:
        """A terminal of which nothing else is known, or wanted."""
        code, outcome = outcome_of(error)
        envelope = Ends(instance=instance, ends=[End(request=request, attempt=attempt, code=code)])
        self.outbox.append((codec.pack_envelope(envelope), codec.encode(EndsBody(outcomes=[outcome]))))

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def flush(self) -> Sequence[StreamOrder]:
        """Turn what changed into messages: one per client, whatever the number of streams.

        Returns:
            What the driver has to do: a stream that cannot be sent ends.
        """
        if not self._dirty or not self.registered:
            self._dirty.clear()
            return self._taken_orders()
        dirty, self._dirty = self._dirty, {}
        interval, name = self._stream_interval, self.name
        chunks: dict[int, Chunks] = {}
        ends: dict[int, list[Backlog]] = {}
        for stream in dirty.values():
            client = stream.client
            if client is None:
                continue
            if stream.outcome is not None:
                ends.setdefault(client, []).append(stream)
            elif stream.end - stream.next < interval and stream.next != stream.resumed:
                continue
            columns = chunks.get(client)
            if columns is None:
                columns = chunks[client] = Chunks()
            if stream.take(columns, name):
                self.observer.held(stream, self._now_ns)
        for client, columns in chunks.items():
            finished = ends.get(client)
            if not columns.requests and finished is None:
                # Its streams wait for credit.
                continue
            columns.complete()
            try:
                frames = pack_whole(client, columns, finished)
                whole = len(frames[0]) + len(frames[1]) <= self._frame_goal
            except ENCODING_ERRORS:
                whole = False
            if whole:
                self.outbox.append(frames)
            else:
                present = [stream for stream in dirty.values() if stream.client == client]
                self._flush_in_parts(client, present, columns, finished or [])
        return self._taken_orders() if self._orders else ()

    def _flush_in_parts(self, client: int, present: list[Backlog], columns: Chunks, finished: list[Backlog]) -> None:
        packing = Packing(client, self.name, self._frame_bytes_max)
        packing.add(present, columns, finished)
        self.outbox += packing.messages
        for stream, error in packing.spoiled:
            self._spoil(stream, error)

    def _taken_orders(self) -> Sequence[StreamOrder]:
        taken, self._orders = self._orders, []
        return taken


def _as_fabric_error(error: Exception) -> FabricError:
    return error if isinstance(error, FabricError) else BackendError(f"{type(error).__name__}: {error}")
