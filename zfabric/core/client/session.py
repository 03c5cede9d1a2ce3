"""The client's side of the protocol as a pure machine: the session with the controller, and what goes through it.

`ClientSession` is told what the link does and collects frames in `outbox`; what arrives for a request goes straight to
its `Sink`. A session begins with a HELLO on every connection, which claims the requests that ran on the former one; the
life of a request is told in `requests`, that of a question in `inquiries`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from zfabric import limits
from zfabric.core.client.failover import next_attempt, takes_nothing_new
from zfabric.core.client.inquiries import Inquiries, Inquiry
from zfabric.core.client.pending import Inquirer, Pending, in_parts
from zfabric.core.client.requests import ClientRequests
from zfabric.core.client.silence import ANSWERED, Silence
from zfabric.core.timers import Timer
from zfabric.errors import (
    ClosedError,
    ConnectionLostError,
    FabricError,
    NameTakenError,
    ProtocolError,
    from_wire,
)
from zfabric.ids import milliseconds
from zfabric.wire import codec, kinds
from zfabric.wire.messages import Beat, ClientHello, Goodbye, Welcome
from zfabric.wire.pieces import chunks_of
from zfabric.wire.questions import Fault


class ClientSession(ClientRequests):
    """Protocol state of one client.

    Args:
        instance: Random number of this client object.
        rng: Chance, for request numbers, seeds and jitter.
        build, label: Told to the controller.
        secret: Random bytes that prove, to a controller that never saw this client, that its streams are its own.
        on_fault: Told of faults that name nothing of this client's.
        deaths_max: Workers that may die under a request in a row, until it ends with PoisonousRequestError.
    """

    def __init__(
        self,
        *,
        instance: int,
        rng: random.Random,
        build: str = "",
        label: str = "",
        secret: bytes = b"",
        on_fault: Callable[[FabricError], None] = lambda _: None,
        deaths_max: int = limits.DEATHS_DEFAULT,
    ) -> None:
        super().__init__(rng, deaths_max)
        self.instance = instance
        self.build = build
        self.label = label
        self.inquiries = Inquiries(self.timers, self._unavailable)
        self.refused: FabricError | None = None
        self._secret = secret
        self._on_fault = on_fault
        self._token = b""
        self._connected = False
        self._connections = 0
        self._hello_timer: Timer | None = None
        self._beat_timer: Timer | None = None
        self._silence = Silence()
        self._watch: Timer | None = None
        #: Requests that the HELLO of this connection claims; None before there is one.
        self._claimed: dict[int, Pending] | None = None

    @property
    def busy(self) -> bool:
        """Whether anybody waits for anything."""
        return bool(self.requests or self.inquiries)

    @property
    def oldest_ns(self) -> int | None:
        """When the oldest of what waits was asked for."""
        first = next((pending.accepted_ns for pending in self.requests.values()), None)
        asked = self.inquiries.oldest_ns
        return asked if first is None else first if asked is None else min(first, asked)

    # ── link ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, now_ns: int) -> None:
        """The link is up."""
        self._connected = True
        self._connections += 1
        self._leave_session()
        # A new connection may be another controller, which has not refused anybody.
        self.refused = None
        jitter_ms = limits.MOVE_JITTER_MS if self.several else limits.HELLO_JITTER_MS
        delay_ms = 0.0 if self._connections == 1 else self._rng.uniform(0, jitter_ms)
        self._say_hello_in(now_ns, delay_ms)
        self._watch_silence(now_ns)

    def denied(self, error: FabricError) -> None:
        """No connection can be made until somebody changes something: no wait will do better."""
        self.refused = error

    def disconnected(self) -> None:
        """The link is down: requests wait for it to come back."""
        self._connected = False
        self._leave_session()
        self.timers.cancel(self._hello_timer)
        self.timers.cancel(self._watch)
        self._watch = None

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

    def abandon(self, error: FabricError, asked_by_ns: int | None = None) -> None:
        """End all requests and questions that were asked by then, or all: there is nobody to serve them."""
        super().abandon(error, asked_by_ns)
        self.inquiries.abandon(error, asked_by_ns)

    def _leave_session(self) -> None:
        self.welcome = None
        self._claimed = None
        # What was to be said is said in another way to the next session: it claims what is still wanted.
        self._cancels.clear()
        self._claims.clear()
        self.timers.cancel(self._beat_timer)

    def _say_hello_in(self, now_ns: int, delay_ms: float) -> None:
        self.timers.cancel(self._hello_timer)
        if delay_ms:
            self._hello_timer = self.timers.at(now_ns + milliseconds(delay_ms), self._hello)
        else:
            self._hello(now_ns)

    def _hello(self, now_ns: int) -> None:
        if not self._connected or self.ready:
            return
        if self._claimed is None:
            # Chosen once for a connection: a HELLO that is said again must not move a claim past the WELCOME.
            first = in_parts([pending for pending in self.requests.values() if pending.submitted])[0]
            self._claimed = {pending.number: pending for pending in first}
            self.counters.claims += len(first)
        hello = ClientHello(
            version=kinds.PROTOCOL_VERSION,
            build=self.build,
            instance=self.instance,
            token=self._token,
            claims=[
                p.claim(moved=self.several) for p in self._claimed.values() if p.submitted and p.number in self.requests
            ],
            label=self.label,
            secret=self._secret,
            minor=kinds.MINOR_VERSION,
        )
        self.outbox.append(codec.pack(hello))
        retry_ms = limits.HELLO_RETRY_MS * self._rng.uniform(0.75, 1.25)
        self._hello_timer = self.timers.at(now_ns + milliseconds(retry_ms), self._hello)

    def _welcomed(self, welcome: Welcome, now_ns: int) -> None:
        if self.ready or not self._connected:
            return
        self.timers.cancel(self._hello_timer)
        self.welcome, self.refused = welcome, None
        self._token = welcome.token
        claimed = self._claimed or {}
        self._claim([p for p in self.requests.values() if p.submitted and p.number not in claimed])
        for pending in list(self.requests.values()):
            if not pending.submitted:
                self._submit_or_end(pending, now_ns)
        self.outbox += self.inquiries.again()
        self._beat_in(welcome, now_ns)

    def _beat_in(self, welcome: Welcome, now_ns: int) -> None:
        beat_ms = min(max(welcome.beat_ms, limits.BEAT_MS_MIN), limits.DEADLINE_MAX_MS)
        self._beat_timer = self.timers.at(now_ns + milliseconds(beat_ms), self._beat)

    def _beat(self, now_ns: int) -> None:
        if self.welcome is not None:
            self.outbox.append(codec.pack(Beat()))
            self._beat_in(self.welcome, now_ns)

    def _watch_silence(self, now_ns: int) -> None:
        """Look from now on whether the controller says anything, as long as anybody waits for it."""
        if self.several and self._watch is None and self._connected and self.busy:
            self._silence.began()
            self._watch = self.timers.at(now_ns + milliseconds(self._silence.period_ms), self._look)

    def _look(self, now_ns: int) -> None:
        self._watch = None
        if not self.busy:
            return
        if self._silence.lasts(now_ns):
            self.counters.moves += 1
            self.leave()
            return
        if self._silence.asks and self.ready:
            # It may have nothing to say.
            self.outbox.append(codec.pack(Beat()))
        self._watch = self.timers.at(now_ns + milliseconds(self._silence.period_ms), self._look)

    def accepted(self, now_ns: int) -> None:
        """Something is waited for."""
        if self.several and self._watch is None:
            self._watch_silence(now_ns)

    def _unavailable(self) -> FabricError | None:
        """Why there is no session, if there is none."""
        if self.ready:
            return None
        return self.refused or ConnectionLostError("no controller answered in time")

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(
        self,
        what: str,
        arguments: dict[str, object],
        inquirer: Inquirer,
        now_ns: int,
        timeout_ms: int = limits.QUERY_TIMEOUT_MS,
    ) -> Inquiry:
        """Ask the controller; see `Inquiries`. Raises: FabricError if it can never be asked."""
        if self._closed:
            raise ClosedError("the client is closed")
        inquiry, frames = self.inquiries.add(what, arguments, inquirer, now_ns, timeout_ms)
        if self.ready:
            self.outbox.append(frames)
        return inquiry

    # ── from the controller ───────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, header: bytes, body: bytes, now_ns: int) -> None:
        """Handle one message.

        Raises:
            ProtocolError: The message makes no sense; the caller counts and forgets it.
        """
        kind = header[0] if header else -1
        self._silence.looks = 0
        if kind == kinds.CHUNKS:
            chunks, broken = chunks_of(header)
            if broken:
                self._broken(broken)
            self._chunks(chunks, now_ns)
            return
        self.timers.now_ns = now_ns
        if kind == kinds.ENDS:
            self._ends(header, body, now_ns)
        elif kind == kinds.BEAT:
            self._silence.looks = ANSWERED
        elif kind == kinds.ANSWER:
            self.inquiries.answer(codec.unpack_control(header))
        elif kind == kinds.WELCOME:
            self._welcomed(codec.unpack_control(header), now_ns)
        elif kind == kinds.UNKNOWN_SESSION:
            self._start_over(now_ns, self._rng.uniform(0, limits.HELLO_JITTER_MS) or 1)
        elif kind == kinds.REFUSED:
            fault = codec.unpack_control(header)
            self.refused = from_wire(fault.code, fault.message, fault.details)
            if isinstance(self.refused, NameTakenError):
                self._take_another_number(now_ns)
            elif self.several and self.refused.retryable:
                self.leave()
            else:
                self._start_over(now_ns, limits.HELLO_RETRY_MS)
        elif kind == kinds.GOODBYE:
            if self.several:
                self.leave()
            else:
                self._start_over(now_ns, limits.HELLO_RETRY_MS)
        elif kind == kinds.FAULT:
            self._fault(codec.unpack_control(header), now_ns)
        else:
            raise ProtocolError(f"kind {kind} is not a message to a client", kind=kind)

    def _start_over(self, now_ns: int, delay_ms: float) -> None:
        """The session is over, the connection is not. Without one a HELLO is on its way already."""
        if self.ready:
            self._leave_session()
            self._say_hello_in(now_ns, delay_ms)

    def _take_another_number(self, now_ns: int) -> None:
        """Somebody else speaks under this client's instance number, which is no secret. It keeps nobody out; what ran under
        it begins anew."""
        self.instance, self._token = self._rng.getrandbits(63), b""
        # Nobody has refused the new one.
        self.refused = None
        self._leave_session()
        self._say_hello_in(now_ns, self._rng.uniform(0, limits.HELLO_JITTER_MS) or 1)

    def _fail(self, pending: Pending, error: FabricError, now_ns: int) -> None:
        """An attempt failed. A controller that takes nothing new is left, with all that runs by it."""
        tries = pending.barren < limits.ATTEMPTS_WITHOUT_PROGRESS_MAX
        if self.several and takes_nothing_new(error) and pending.body and tries:
            next_attempt(pending, error)
            self.leave()
        else:
            super()._fail(pending, error, now_ns)

    def _fault(self, fault: Fault, now_ns: int) -> None:
        """A message of this side was no use to the controller: what it was about ends."""
        error = from_wire(fault.code, fault.message, fault.details)
        if fault.query is not None and self.inquiries.fail(fault.query, error):
            return
        if not self._faulted(fault.request, fault.attempt, error, now_ns):
            self.counters.faults += 1
            self._on_fault(error)
