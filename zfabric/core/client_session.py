"""The client's side of the protocol as a pure machine: submit, order of chunks, credit, failover, claims, deadlines.

`ClientSession` is told what the link does and collects frames in `outbox`; what arrives for a request goes straight to
its `Sink`. Every request that was submitted ends with exactly one `Sink.ended`, whatever dies: from the controller's or
a worker's terminal, from the guard of its deadline, or from `close`.

Failover is the client's own: it alone has the prompt and all tokens so far. When an attempt is lost it submits the next
one, with the tokens it has, and the reader sees nothing. It does so only if the answer is reproducible (greedy or
seeded) or nothing has arrived yet, and stops when several attempts in a row yield nothing.
"""

from __future__ import annotations

import random

from msgspec import structs

from zfabric import limits
from zfabric.core.pending import Inquirer, Pending, Resume, SessionCounters, Sink
from zfabric.core.timers import Timer, Timers
from zfabric.errors import (
    FAILOVER_CODES,
    ClosedError,
    ConnectionLostError,
    DeadlineExceededError,
    FabricError,
    IncorrectKeyError,
    ParameterRangeError,
    ProtocolError,
    QuotaExceededError,
    RequestCancelledError,
    TooLargeError,
    from_wire,
)
from zfabric.ids import milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.messages import (
    Answer,
    Beat,
    Cancel,
    Claim,
    ClientHello,
    Credit,
    CreditLine,
    Goodbye,
    Operation,
    Query,
    Submit,
    Welcome,
)
from zfabric.wire.payloads import AnyRequest, Chunk, GenerateRequest, Outcome


class ClientSession:
    """Protocol state of one client.

    Args:
        instance: Random number of this client object.
        rng: Chance, for request numbers and jitter.
        build, label: Told to the controller.
    """

    def __init__(self, *, instance: int, rng: random.Random, build: str = "", label: str = "") -> None:
        self.instance = instance
        self.build = build
        self.label = label
        self.outbox: list[codec.Frames] = []
        self.timers = Timers()
        self.requests: dict[int, Pending] = {}
        self.welcome: Welcome | None = None
        self.refused: FabricError | None = None
        self.counters = SessionCounters()
        self._rng = rng
        self._token = b""
        self._connected = False
        self._connections = 0
        self._hello_timer: Timer | None = None
        self._beat_timer: Timer | None = None
        self._queries: dict[int, tuple[Inquirer, codec.Frames]] = {}
        self._query_number = 0
        self._credit: dict[int, Pending] = {}
        self._closed = False

    @property
    def ready(self) -> bool:
        """Whether the controller has welcomed this connection."""
        return self.welcome is not None

    @property
    def busy(self) -> bool:
        """Whether anybody waits for anything."""
        return bool(self.requests or self._queries)

    @property
    def credit_due(self) -> bool:
        """Whether `flush` would send credit."""
        return bool(self._credit)

    # ── link ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, now_ns: int) -> None:
        """The link is up."""
        self._connected = True
        self._connections += 1
        self.welcome = None
        delay_ms = 0.0 if self._connections == 1 else self._rng.uniform(0, limits.HELLO_JITTER_MS)
        self._say_hello_in(now_ns, delay_ms)

    def denied(self, endpoint: str) -> None:
        """The controller does not know this side's key: no try will do better."""
        self.refused = IncorrectKeyError(f"the controller at {endpoint} does not know this key", endpoint=endpoint)

    def disconnected(self) -> None:
        """The link is down: requests wait for it to come back."""
        self._connected = False
        self.welcome = None
        self.timers.cancel(self._hello_timer)
        self.timers.cancel(self._beat_timer)

    def tick(self, now_ns: int) -> None:
        """Do what is due."""
        self.timers.now_ns = now_ns
        self.timers.run(now_ns)

    def close(self) -> None:
        """End every request with ClosedError, and say goodbye."""
        self._closed = True
        self.abandon(ClosedError("the client was closed"))
        if self.ready:
            self.outbox.append(codec.pack(Goodbye()))

    def abandon(self, error: FabricError) -> None:
        """End every request and question with an error: there is nobody to serve them."""
        for pending in list(self.requests.values()):
            self._end(pending, error, None)
        for inquirer, _ in list(self._queries.values()):
            inquirer.answered(error, None)
        self._queries.clear()

    def _say_hello_in(self, now_ns: int, delay_ms: float) -> None:
        self.timers.cancel(self._hello_timer)
        if delay_ms:
            self._hello_timer = self.timers.at(now_ns + milliseconds(delay_ms), self._hello)
        else:
            self._hello(now_ns)

    def _hello(self, now_ns: int) -> None:
        if not self._connected or self.ready:
            return
        claims = [
            Claim(
                request=pending.number,
                attempt=pending.attempt,
                next=pending.next,
                window=pending.granted,
                model=pending.model,
            )
            for pending in self.requests.values()
            if pending.submitted
        ]
        self.counters.claims += len(claims)
        hello = ClientHello(
            version=kinds.PROTOCOL_VERSION,
            build=self.build,
            instance=self.instance,
            token=self._token,
            claims=claims,
            label=self.label,
        )
        self.outbox.append(codec.pack(hello))
        retry_ms = limits.HELLO_RETRY_MS * self._rng.uniform(0.75, 1.25)
        self._hello_timer = self.timers.at(now_ns + milliseconds(retry_ms), self._hello)

    def _welcomed(self, welcome: Welcome, now_ns: int) -> None:
        if self.ready:
            return
        self.timers.cancel(self._hello_timer)
        self.welcome, self.refused = welcome, None
        self._token = welcome.token
        for pending in list(self.requests.values()):
            if not pending.submitted:
                self._submit_or_end(pending, now_ns)
        for _, frames in self._queries.values():
            self.outbox.append(frames)
        self._beat_timer = self.timers.at(now_ns + milliseconds(welcome.beat_ms), self._beat)

    def _beat(self, now_ns: int) -> None:
        if self.welcome is not None:
            self.outbox.append(codec.pack(Beat()))
            self._beat_timer = self.timers.at(now_ns + milliseconds(self.welcome.beat_ms), self._beat)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

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
    ) -> Pending:
        """Accept a request. It leaves now, or when the controller is there.

        Raises:
            FabricError: It can never be sent: closed, too many in flight, out of range, or too large.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        if len(self.requests) >= limits.CLIENT_REQUESTS_MAX:
            raise QuotaExceededError(
                f"{len(self.requests)} requests are in flight, limit is {limits.CLIENT_REQUESTS_MAX}"
            )
        request.validate()
        _check_range("deadline_ms", deadline_ms, 0, limits.DEADLINE_MAX_MS)
        _check_range("priority", priority, -limits.PRIORITY_MAX, limits.PRIORITY_MAX)
        _check_range("length of model", len(model), 0 if worker else 1, limits.NAME_LENGTH_MAX)
        number = self._rng.getrandbits(63)
        while number in self.requests:
            number = self._rng.getrandbits(63)
        pending = Pending(number, operation, request, sink, model=model, priority=priority, worker=worker)
        pending.resume = resume
        pending.window = pending.granted = window
        if deadline_ms is not None:
            pending.deadline_ns = now_ns + milliseconds(deadline_ms)
            guard_ns = pending.deadline_ns + milliseconds(limits.DEADLINE_GUARD_MS)
            pending.guard = self.timers.at(guard_ns, lambda _: self._guard(pending))
        if self.ready:
            self._submit(pending, now_ns)
        self.requests[number] = pending
        self.counters.submitted += 1
        return pending

    def cancel(self, pending: Pending) -> None:
        """Stop a request. It ends here and now with RequestCancelledError; the engine hears of it within a round trip."""
        if pending.number not in self.requests:
            return
        if pending.submitted and self.ready:
            self.outbox.append(codec.pack(Cancel([pending.number])))
        self._end(pending, RequestCancelledError("cancelled"), None)

    def consumed(self, pending: Pending, units: int) -> None:
        """The reader took so many units; credit follows when half of the window is used."""
        pending.consumed += units
        if pending.granted - pending.consumed < pending.window // 2 and pending.number in self.requests:
            self._credit[pending.number] = pending

    def flush(self) -> None:
        """Send the credit that became due, all streams in one message."""
        if not self._credit:
            return
        lines = []
        for pending in self._credit.values():
            if pending.number in self.requests:
                pending.granted = pending.consumed + pending.window
                line = CreditLine(
                    request=pending.number, attempt=pending.attempt, next=pending.next, window=pending.granted
                )
                lines.append(line)
        self._credit.clear()
        if lines and self.ready:
            self.outbox.append(codec.pack(Credit(lines)))

    def _submit(self, pending: Pending, now_ns: int) -> None:
        request = pending.request
        if pending.next and isinstance(request, GenerateRequest):
            request = structs.replace(request, resume_token_ids=pending.token_ids, resume_characters=pending.characters)
        body = codec.encode(request)
        limit = self.welcome.frame_bytes_max if self.welcome is not None else limits.FRAME_BYTES_MAX
        if len(body) > limit:
            raise TooLargeError(f"request holds {len(body)} bytes, limit is {limit}", size=len(body), limit=limit)
        left_ms = None
        if pending.deadline_ns is not None:
            left_ms = max(0, (pending.deadline_ns - now_ns) // 1_000_000)
        envelope = Submit(
            request=pending.number,
            attempt=pending.attempt,
            operation=pending.operation,
            model=pending.model,
            priority=pending.priority,
            deadline_ms=left_ms,
            window=pending.granted,
            resume_from=pending.next,
            worker=pending.worker,
        )
        pending.submitted = True
        self.outbox.append((codec.pack_envelope(envelope), body))

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
        pending.sink.ended(error, outcome)

    def _guard(self, pending: Pending) -> None:
        """The controller should have said so by now: it is away, or this host was asleep."""
        if pending.submitted and self.ready:
            self.outbox.append(codec.pack(Cancel([pending.number])))
        self._end(pending, DeadlineExceededError("deadline passed without an answer"), None)

    def _fail(self, pending: Pending, error: FabricError, now_ns: int) -> None:
        """An attempt failed: go on with the next one, or end the request."""
        refusal = self._why_final(pending, error, now_ns)
        if refusal is not None:
            self._end(pending, refusal, None)
            return
        self.counters.failovers += 1
        pending.attempt += 1
        pending.barren += 1
        pending.submitted = False
        if self.ready:
            self._submit_or_end(pending, now_ns)

    def _why_final(self, pending: Pending, error: FabricError, now_ns: int) -> FabricError | None:
        """The error that the caller gets, or None if another attempt is to be made."""
        if error.code not in FAILOVER_CODES or error.details.get("resumable") is False:
            return error
        if pending.operation == "operate" or pending.resume == "never":
            return error
        if pending.barren >= limits.ATTEMPTS_WITHOUT_PROGRESS_MAX or pending.attempt >= limits.ATTEMPTS_MAX:
            return error
        if pending.deadline_ns is not None and now_ns >= pending.deadline_ns:
            return DeadlineExceededError("deadline passed after a worker was lost")
        if pending.next:
            exact = isinstance(pending.request, GenerateRequest) and pending.request.sampling.reproducible
            if len(pending.token_ids) != pending.next or not (exact or pending.resume == "any"):
                return error
        return None

    # ── queries ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, what: str, arguments: dict[str, object], inquirer: Inquirer) -> int:
        """Ask the controller. The question is asked again after a reconnect, so it must be one without side effects,
        or one that may be done twice."""
        if self._closed:
            raise ClosedError("the client is closed")
        self._query_number += 1
        frames = codec.pack(Query(number=self._query_number, what=what, arguments=arguments))
        self._queries[self._query_number] = (inquirer, frames)
        if self.ready:
            self.outbox.append(frames)
        return self._query_number

    def forget_query(self, number: int) -> None:
        """The asker went away."""
        self._queries.pop(number, None)

    # ── from the controller ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, header: bytes, body: bytes, now_ns: int) -> None:
        """Handle one message.

        Raises:
            ProtocolError: The message makes no sense; the caller counts and forgets it.
        """
        kind = header[0] if header else -1
        if kind == kinds.CHUNKS:
            self._chunks(codec.unpack_chunks(header), now_ns)
            return
        self.timers.now_ns = now_ns
        if kind == kinds.ENDS:
            self._ends(header, body, now_ns)
        elif kind == kinds.BEAT:
            pass
        elif kind == kinds.ANSWER:
            self._answer(codec.unpack_control(header))
        elif kind == kinds.WELCOME:
            self._welcomed(codec.unpack_control(header), now_ns)
        elif kind == kinds.UNKNOWN_SESSION:
            if self._connected:
                self.welcome = None
                self._say_hello_in(now_ns, self._rng.uniform(0, limits.HELLO_JITTER_MS) or 1)
        elif kind == kinds.REFUSED:
            fault = codec.unpack_control(header)
            self.refused = from_wire(fault.code, fault.message, fault.details)
        elif kind == kinds.GOODBYE:
            self.welcome = None
            self._say_hello_in(now_ns, limits.HELLO_RETRY_MS)
        elif kind != kinds.FAULT:
            raise ProtocolError(f"kind {kind} is not a message to a client", kind=kind)

    def _chunks(self, chunks: list[Chunk], now_ns: int) -> None:
        """This is the only loop over chunks. What must be done for every chunk is done here."""
        requests = self.requests
        for chunk in chunks:
            pending = requests.get(chunk.request)
            if pending is None or chunk.attempt != pending.attempt:
                self.counters.stale_chunks += 1
                continue
            if chunk.offset != pending.next:
                self._out_of_order(pending, chunk, now_ns)
                continue
            extra = chunk.extra
            tokens = chunk.token_ids
            pending.next += (len(tokens) or 1) if extra is None or extra.units is None else extra.units
            pending.characters += len(chunk.text)
            pending.token_ids += tokens
            pending.barren = 0
            pending.sink.arrived(chunk)

    def _out_of_order(self, pending: Pending, chunk: Chunk, now_ns: int) -> None:
        if chunk.offset < pending.next:
            self.counters.repeated_chunks += 1
            return
        self.counters.gaps += 1
        self.outbox.append(codec.pack(Cancel([pending.number])))
        error = ConnectionLostError(
            f"units {pending.next} to {chunk.offset} were lost on the way", next=pending.next, offset=chunk.offset
        )
        self._fail(pending, error, now_ns)

    def _ends(self, header: bytes, body: bytes, now_ns: int) -> None:
        envelope = codec.unpack_envelope(header)
        try:
            content = codec.unpack_ends_body(body)
            if len(content.outcomes) != len(envelope.ends):
                raise ProtocolError(f"{len(envelope.ends)} ends have {len(content.outcomes)} outcomes")
        except ProtocolError as error:
            # The terminal itself is known from the envelope, so its reader must not wait for another.
            for end in envelope.ends:
                pending = self.requests.get(end.request)
                if pending is not None and end.attempt == pending.attempt:
                    self._end(pending, error, None)
            raise
        self._chunks(content.chunks, now_ns)
        for end, outcome in zip(envelope.ends, content.outcomes, strict=True):
            pending = self.requests.get(end.request)
            if pending is None or end.attempt != pending.attempt:
                continue
            if end.code == RequestCancelledError.code:
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

    def _answer(self, answer: Answer) -> None:
        inquirer, _ = self._queries.pop(answer.number, (None, None))
        if inquirer is None:
            return
        if answer.code:
            inquirer.answered(from_wire(answer.code, answer.message, answer.details), None)
        else:
            inquirer.answered(None, answer)


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ParameterRangeError(f"{name} is {value}, it must be {low} … {high}", parameter=name, value=value)
