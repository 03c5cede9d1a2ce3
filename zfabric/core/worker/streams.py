"""What happens to the requests of a worker in one session with a controller.

Deltas go into each stream's backlog, and leave as far as the session and the reader's credit allow. A terminal frees the
request's slot at the controller. So a request that is to stop while its engine runs waits in `stopping` until the driver
says that the engine has stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.orders import Begin, Columns, Spoiled, Stop, StreamOrder, name_of
from zfabric.core.worker.packing import Packing, pack_whole
from zfabric.core.worker.soundness import outcome_of, outcome_with
from zfabric.core.worker.tables import Stopping, StreamTables
from zfabric.errors import (
    BackendError,
    FabricError,
    ProtocolError,
    RequestCancelledError,
    WorkerDrainingError,
    WorkerLostError,
)
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.bounds import check_request
from zfabric.wire.chunks import Chunks
from zfabric.wire.flow import Abort, CreditLine, Grant
from zfabric.wire.messages import Dispatch
from zfabric.wire.payloads import Delta, TextRequest
from zfabric.wire.plain import ENCODING_ERRORS


class WorkerStreams(StreamTables):
    """What a controller orders, what engines make, and what leaves because of either. See `StreamTables` for arguments."""

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
        if envelope.operation == "operate":
            self._calls.add(request_id)
        try:
            self._check_siblings(request_id, envelope.operation, now_ns)
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

    def _check_siblings(self, request_id: str, operation: str, now_ns: int) -> None:
        """Raises: FabricError, another controller has given the worker the same attempt, or the last slot."""
        siblings, slots = self._siblings, self.load.slots
        if siblings is None:
            return
        if siblings.holder_of(request_id, self) is not None:
            raise ProtocolError(f"worker {self.name!r} has this attempt by another controller")
        if operation != "operate" and not self.draining and siblings.overrun:
            # Told before the terminal: the controller must not send the next one here for it.
            self.report(now_ns)
            raise WorkerDrainingError(
                f"worker {self.name!r} has {siblings.held - 1} requests, of all its controllers, and {slots} slots",
                worker=self.name,
                busy=True,
            )

    def report(self, now_ns: int, *, streams: bool = False) -> None:
        """Tell the controller how the worker is."""
        raise NotImplementedError

    def _adopt(self, request_id: str) -> Backlog | None:
        """Take over what another controller's reader had."""
        former = None if self._siblings is None else self._siblings.holder_of(request_id, self)
        stream = None if former is None else former.release(request_id, self._now_ns)
        if stream is None:
            return None
        if stream.finished:
            stream.finished_ns = self._now_ns
            self._keep(stream)
        else:
            self.streams[request_id] = stream
            if stream.operation == "operate":
                self._calls.add(request_id)
        return stream

    def granted(self, grant: Grant) -> None:
        """Take credit, and send again what a reader that came another way lacks."""
        for line in grant.lines:
            request_id = name_of(grant.instance, line.request, line.attempt)
            stream = self.answer_of(request_id)
            if stream is None and line.again and request_id not in self.stopping:
                stream = self._adopt(request_id)
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
        self._calls.discard(request_id)
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
        self.stopping[stream.request_id] = Stopping(stream, error)
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
        self._calls.discard(stream.request_id)
        if self._siblings is not None:
            self._siblings.freed(self, now_ns)
        self._dirty[stream.request_id] = stream
        self._keep(stream)

    def _keep(self, stream: Backlog) -> None:
        """Keep a finished answer for a reader whose controller may just be dying."""
        self._kept.keep(stream)

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
