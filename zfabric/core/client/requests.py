"""The life of requests at their client: submit, order of chunks, credit, failover, claims, deadlines.

Every request that was submitted ends with exactly one `Sink.ended`, whatever dies: from the controller's or a worker's
terminal, from a fault that names it, from the guard of its deadline, or from `close`. Nothing that the controller or a
worker sends ends a request that it is not about.

Failover is the client's own: it alone has the prompt and all tokens so far. When an attempt is lost it submits the next
one, with the tokens it has, and the reader sees nothing. It does so only if the answer is reproducible (greedy, seeded,
or drawn by a seed that the worker took) or nothing has arrived yet, and stops when several attempts in a row yield
nothing. What cannot go on elsewhere is claimed: if its worker had only lost its connection, it goes on there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from msgspec import structs

from zfabric import limits
from zfabric.core.client import failover
from zfabric.core.client.bodies import continued, encoded
from zfabric.core.client.extras import units_of
from zfabric.core.client.failover import may_return, next_attempt, nobody_continues, why_final
from zfabric.core.client.pending import Pending, Resume, SessionCounters, Sink, Trace, check_ranges, in_parts, slices
from zfabric.core.timers import Timers
from zfabric.errors import (
    ClosedError,
    ConnectionLostError,
    DeadlineExceededError,
    FabricError,
    ProtocolError,
    QuotaExceededError,
    RequestCancelledError,
    TooLargeError,
    from_wire,
)
from zfabric.ids import milliseconds
from zfabric.wire import codec
from zfabric.wire.answers import Outcome
from zfabric.wire.chunks import Chunks
from zfabric.wire.fields import Operation
from zfabric.wire.flow import Cancel, Credit, CreditLine
from zfabric.wire.messages import Claims, Submit, Welcome
from zfabric.wire.payloads import AnyRequest, TextRequest
from zfabric.wire.pieces import Broken, ends_of

#: The minor version since which a controller takes what prompts are known by.
_PREFIXES_MINOR: Final = 2


class ClientRequests:
    """Requests of one client that have not ended. `ClientSession` adds the session that they go through.

    Args:
        rng: Chance, for request numbers and seeds.
        deaths_max: Workers that may die under a request in a row, until it ends with PoisonousRequestError.
    """

    def __init__(self, rng: random.Random, deaths_max: int = limits.DEATHS_DEFAULT) -> None:
        self.deaths_max = deaths_max
        self.outbox: list[codec.Frames] = []
        self.timers = Timers()
        self.requests: dict[int, Pending] = {}
        self.welcome: Welcome | None = None
        self.counters = SessionCounters()
        #: Whether there are several controllers: what was submitted to one may be claimed at another.
        self.several = False
        #: Leaves this connection for the next controller; the driver sets it.
        self.leave: Callable[[], None] = lambda: None
        self._rng = rng
        self._claims: dict[int, Pending] = {}
        self._cancels: list[int] = []
        self._credit: dict[int, Pending] = {}
        self._closed = False

    @property
    def ready(self) -> bool:
        """Whether the controller has welcomed this connection."""
        return self.welcome is not None

    @property
    def flush_due(self) -> bool:
        """Whether `flush` has anything to send."""
        return bool(self._credit or self._cancels or self._claims)

    # ── from the caller ───────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        operation: Operation,
        request: AnyRequest,
        sink: Sink,
        now_ns: int,
        *,
        model: str,
        priority: int = 0,
        deadline_ms: int | None = None,
        worker: str = "",
        resume: Resume = "exact",
        window: int = limits.WINDOW_UNITS,
        trace: Trace | None = None,
        affinity: str = "",
        prefix: bytes = b"",
        prefix_block: int = 0,
    ) -> Pending:
        """Accept a request. It leaves now, or when the controller is there.

        Args:
            request: One that its `validate` has nothing against; its worker looks again.
            trace: The trace that it belongs to, and that is told of it.
            affinity: Requests of one key may be sent to one worker.
            prefix, prefix_block: Hashes of the prompt's first blocks, and the size of one.

        Raises:
            FabricError: It can never be sent: closed, too many in flight, out of range, not encodable, or too large.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        if len(self.requests) >= limits.CLIENT_REQUESTS_MAX:
            raise QuotaExceededError(
                f"{len(self.requests)} requests are in flight, limit is {limits.CLIENT_REQUESTS_MAX}"
            )
        check_ranges(model, worker, priority, deadline_ms, affinity)
        seed: int | None = None
        if isinstance(request, TextRequest) and request.sampling.seed is None:
            seed = self._rng.getrandbits(63)
            request = structs.replace(request, drawn_seed=seed)
        body = encoded(request, self._body_bytes_max)
        pending = Pending(
            self._unused_number(),
            operation,
            body,
            sink,
            model=model,
            worker=worker,
            priority=priority,
            resume=resume,
            window=window,
            accepted_ns=now_ns,
            deaths_max=self.deaths_max,
        )
        pending.drawn_seed = seed
        if isinstance(request, TextRequest):
            pending.single, pending.reproducible = request.sampling.single, request.sampling.reproducible
        if deadline_ms is not None:
            pending.deadline_ns = now_ns + milliseconds(deadline_ms)
            guard_ns = pending.deadline_ns + milliseconds(limits.DEADLINE_GUARD_MS)
            pending.guard = self.timers.at(guard_ns, lambda _: self._guard(pending))
        pending.trace = trace
        pending.affinity, pending.prefix, pending.prefix_block = affinity, prefix, prefix_block
        self.requests[pending.number] = pending
        self.counters.submitted += 1
        if self.ready:
            self._submit(pending, now_ns)
        return pending

    def _unused_number(self) -> int:
        number = self._rng.getrandbits(63)
        while number in self.requests:
            number = self._rng.getrandbits(63)
        return number

    def cancel(self, pending: Pending) -> None:
        """Stop a request. It ends here and now with RequestCancelledError; the engine hears of it within a round trip."""
        if pending.number in self.requests:
            self._give_up(pending, RequestCancelledError("cancelled"))

    def abandon(self, error: FabricError, asked_by_ns: int | None = None) -> None:
        """End all requests that were accepted by then, or all: there is nobody to serve them."""
        ended: list[Pending] = []
        for pending in self.requests.values():
            if asked_by_ns is not None and pending.accepted_ns > asked_by_ns:
                break
            ended.append(pending)
        for pending in ended:
            self._end(pending, error, None)

    def consumed(self, read: Iterable[tuple[Pending, int]]) -> None:
        """Readers took so many units of each; credit follows when half of a window is used."""
        for pending, units in read:
            consumed = pending.consumed = pending.consumed + units
            if pending.granted - consumed < pending.window // 2 and pending.number in self.requests:
                self._credit[pending.number] = pending

    def flush(self) -> None:
        """Send what can wait for the end of a turn: cancels, claims and credit, of all streams together."""
        if self._cancels:
            cancels, self._cancels = self._cancels, []
            self.outbox += [codec.pack(Cancel(part)) for part in slices(cancels)]
        if self._claims:
            claims, self._claims = self._claims, {}
            self._claim([pending for pending in claims.values() if pending.number in self.requests])
        if self._credit:
            self._send_credit()

    def _send_credit(self) -> None:
        lines = []
        for pending in self._credit.values():
            if pending.number in self.requests:
                pending.granted = pending.consumed + pending.window
                line = CreditLine(
                    request=pending.number, attempt=pending.attempt, next=pending.next, window=pending.granted
                )
                lines.append(line)
        self._credit.clear()
        if self.ready:
            self.outbox += [codec.pack(Credit(part)) for part in slices(lines)]

    def _claim(self, pendings: list[Pending]) -> None:
        self.counters.claims += len(pendings)
        self.outbox += [
            codec.pack(Claims([p.claim(moved=self.several) for p in part])) for part in in_parts(pendings) if part
        ]

    def _submit(self, pending: Pending, now_ns: int) -> None:
        body = pending.body
        if pending.next and pending.operation == "generate":
            pending.pinned = pending.exact and not pending.reproducible
            seed = pending.drawn_seed if pending.pinned else None
            body = continued(body, pending.token_ids, pending.characters, seed)
        limit = self._body_bytes_max
        if len(body) > limit:
            raise TooLargeError(f"request holds {len(body)} bytes, limit is {limit}", size=len(body), limit=limit)
        envelope = Submit(
            request=pending.number,
            attempt=pending.attempt,
            operation=pending.operation,
            model=pending.model,
            priority=pending.priority,
            deadline_ms=pending.left_ms(now_ns),
            window=pending.granted,
            resume_from=pending.next,
            worker=pending.worker,
            affinity=pending.affinity,
        )
        if pending.prefix and self.welcome is not None and self.welcome.minor >= _PREFIXES_MINOR:
            envelope.prefix, envelope.prefix_block = pending.prefix, pending.prefix_block
        if pending.trace is not None:
            context = pending.trace.context
            envelope.traceparent, envelope.tracestate = context.traceparent, context.state
        self.outbox.append((codec.pack_envelope(envelope), body))
        pending.submitted = True
        if not pending.repeatable and not self.several:
            pending.body = b""

    @property
    def _body_bytes_max(self) -> int:
        return self.welcome.frame_bytes_max if self.welcome is not None else limits.FRAME_BYTES_MAX

    def _submit_or_end(self, pending: Pending, now_ns: int) -> None:
        try:
            self._submit(pending, now_ns)
        except FabricError as failure:
            self._end(pending, failure, None)

    def _end(self, pending: Pending, error: FabricError | None, outcome: Outcome | None) -> None:
        if self.requests.pop(pending.number, None) is None:
            return
        self.timers.cancel(pending.guard)
        self._credit.pop(pending.number, None)
        if pending.trace is not None:
            pending.trace.ended(error, outcome)
        pending.sink.ended(error, outcome)

    def _give_up(self, pending: Pending, error: FabricError) -> None:
        """End a request from this side, and have it stopped."""
        if pending.submitted and self.ready:
            self._cancels.append(pending.number)
        self._end(pending, error, None)

    def _guard(self, pending: Pending) -> None:
        """The controller should have said so by now: it is away, or this host was asleep."""
        self._give_up(pending, DeadlineExceededError("deadline passed without an answer"))

    def _break(self, pending: Pending, failure: Exception) -> None:
        """A part of an answer is no use: its request ends, and nobody else's."""
        self.counters.broken += 1
        if not isinstance(failure, FabricError):
            failure = ProtocolError(f"a part of the answer is no use: {type(failure).__name__}: {failure}")
        self._give_up(pending, failure)

    def _fail(self, pending: Pending, error: FabricError, now_ns: int) -> None:
        """An attempt failed: go on with the next one, wait for its worker, or end the request."""
        current = True
        if pending.pinned and pending.loss is not None and failover.refuses_seed(error):
            # This worker cannot draw as the former one did.
            pending.exact = pending.pinned = current = False
            error = pending.loss
            pending.deaths -= failover.deaths_of(error)
        if nobody_continues(error) and pending.loss is not None and may_return(pending.loss):
            self._go_back(pending)
            return
        final = why_final(pending, error, now_ns)
        if final is None:
            self.counters.failovers += 1
            next_attempt(pending, error)
            if pending.trace is not None:
                pending.trace.failed_over(pending.attempt, error)
            if self.ready:
                self._submit_or_end(pending, now_ns)
        elif current and final is error and may_return(error) and pending.waits < limits.ATTEMPTS_MAX:
            self._wait_for_worker(pending)
        else:
            self._end(pending, final, None)

    def _go_back(self, pending: Pending) -> None:
        """Nobody else can go on, but the worker that was lost may come back: the attempt that it had is claimed after all."""
        pending.attempt -= 1
        pending.deaths -= 0 if pending.loss is None else failover.deaths_of(pending.loss)
        pending.loss = None
        pending.pinned = False
        pending.submitted = True
        self._wait_for_worker(pending)

    def _wait_for_worker(self, pending: Pending) -> None:
        pending.waits += 1
        if self.ready:
            self._claims[pending.number] = pending

    # ── from workers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _chunks(self, columns: Chunks, now_ns: int) -> None:
        """This is the only loop over chunks. What must be done for every chunk is done here."""
        requests = self.requests
        for number, attempt, index, offset, text, tokens, extra in columns.entries():
            pending = requests.get(number)
            if pending is None or attempt != pending.attempt:
                self.counters.stale_chunks += 1
                continue
            if offset != pending.next:
                self._out_of_order(pending, offset, now_ns)
                continue
            try:
                token_ids = tokens if isinstance(tokens, list) else [tokens]
                pending.next = offset + (
                    (len(token_ids) or 1) if extra is None else units_of(pending, index, token_ids, extra)
                )
                pending.characters += len(text)
                pending.token_ids += token_ids
                pending.barren = 0
                pending.sink.arrived(index, text, token_ids, extra)
            except Exception as failure:  # noqa: BLE001 — one stream's trouble must not touch its neighbours
                self._break(pending, failure)

    def _broken(self, broken: Sequence[Broken]) -> None:
        for part in broken:
            pending = self.requests.get(part.request)
            if pending is not None and part.attempt == pending.attempt:
                self._break(pending, part.error)

    def _out_of_order(self, pending: Pending, offset: int, now_ns: int) -> None:
        if offset < pending.next:
            self.counters.repeated_chunks += 1
            return
        self.counters.gaps += 1
        if self.ready:
            # Before the next attempt, which it would end as well.
            self.outbox.append(codec.pack(Cancel([pending.number])))
        error = ConnectionLostError(
            f"units {pending.next} to {offset} were lost on the way", next=pending.next, offset=offset
        )
        self._fail(pending, error, now_ns)

    def _ends(self, header: bytes, body: bytes, now_ns: int) -> None:
        envelope = codec.unpack_envelope(header)
        chunks, broken, outcomes = ends_of(body, len(envelope.ends))
        self._broken(broken)
        self._chunks(chunks, now_ns)
        for end, outcome in zip(envelope.ends, outcomes, strict=True):
            pending = self.requests.get(end.request)
            if pending is None or end.attempt != pending.attempt:
                continue
            if isinstance(outcome, ProtocolError):
                # The terminal itself is known from the envelope, so its reader must not wait for another.
                self.counters.broken += 1
                self._end(pending, outcome, None)
            elif end.code == RequestCancelledError.code:
                # Whoever cancels here does not wait for this word, so the fabric stopped what a former connection of
                # this client had left behind.
                stopped = ConnectionLostError("the request was stopped with a former connection of its client")
                self._fail(pending, stopped, now_ns)
            elif end.code:
                self._fail(pending, from_wire(end.code, outcome.message, outcome.details), now_ns)
            elif pending.operation == "generate" and outcome.units != pending.next:
                self.counters.gaps += 1
                lost = f"the answer has {outcome.units} units, {pending.next} arrived"
                self._fail(pending, ConnectionLostError(lost, next=pending.next, units=outcome.units), now_ns)
            else:
                self._end(pending, None, outcome)

    def _faulted(self, request: int | None, attempt: int | None, error: FabricError, now_ns: int) -> bool:
        """The controller could not use a SUBMIT. False if it is none of an attempt that runs."""
        pending = self.requests.get(request) if request is not None else None
        if pending is None or attempt not in (None, pending.attempt):
            return False
        self._fail(pending, error, now_ns)
        return True
