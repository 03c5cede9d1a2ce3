"""A client's or worker's socket on an asyncio loop: one pump that owns the socket's events.

libzmq's file descriptor is edge-triggered, and a send may consume the edge that announced a message. So the pump reads
until nothing is left, in bounded bursts, and every send is followed by the same check. `zmq.asyncio` is not used: its
futures cost more than the messages they carry.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

import zmq

from zfabric import limits
from zfabric.errors import ConfigurationError
from zfabric.transport.calls import EVENTS, LAST, MORE, POLLIN, calls_of
from zfabric.transport.context import make_context
from zfabric.transport.curve import Credentials
from zfabric.transport.dialer import Dialer
from zfabric.transport.endpoints import Endpoint, parse_endpoints
from zfabric.transport.links import DealerReceiver
from zfabric.transport.monitor import Happened, Monitor
from zfabric.transport.options import set_dealer_options
from zfabric.wire.codec import EMPTY
from zfabric.wire.kinds import WITH_BODY

#: A check that nothing was left behind by a missed edge; it has nothing to do, and counts if it had.
_WATCHDOG_S: Final = 0.25
_RECHECK_S: Final = 0.01
#: Copying less than this is cheaper than lending libzmq the bytes.
_COPY_BYTES_MAX: Final = 64 * 1024


@dataclass(slots=True)
class DealerFigures:
    """What the link counted; bytes are those of messages' frames."""

    malformed: int = 0
    rescued: int = 0
    connections: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


class DealerLink:
    """One DEALER, connected to one controller.

    Args:
        endpoint: The controller's.
        receiver: Told what comes.
        rng: Chance, for the jitter of reconnects.
        credentials: Keys for a controller that wants them.

    Raises:
        ConfigurationError: The endpoint is malformed, an ipc socket's directory is somebody else's, a key cannot be used,
            or the system gives no socket.
    """

    def __init__(
        self, endpoint: str, receiver: DealerReceiver, rng: random.Random, credentials: Credentials | None = None
    ) -> None:
        self.endpoint = endpoint
        self.figures = DealerFigures()
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._connected = False
        self._scheduled = False
        self._closed = False
        self._pumps = 0
        self._seen = -1
        self._retry: asyncio.TimerHandle | None = None
        self._retry_ms = limits.CONGESTED_RETRY_MS
        parsed = parse_endpoints(endpoint)
        with contextlib.ExitStack() as made:
            try:
                self._make(made, parsed, rng, credentials)
            except zmq.ZMQError as error:
                raise ConfigurationError(f"no socket for {endpoint} can be made: {error}", endpoint=endpoint) from error
            self._made = made.pop_all()
        self._watchdog = self._loop.call_later(_WATCHDOG_S, self._rescue)

    def _make(
        self, made: contextlib.ExitStack, endpoints: list[Endpoint], rng: random.Random, credentials: Credentials | None
    ) -> None:
        """Make all that has to be freed again, and note how."""
        context = make_context()
        made.callback(context.term)
        socket = context.socket(zmq.DEALER)
        made.callback(socket.close, linger=50)
        set_dealer_options(socket, credentials)
        self._send, self._receive, self._option = calls_of(socket)
        self._monitor = Monitor(socket)
        made.callback(self._monitor.close)
        for fd, ready in ((int(socket.getsockopt(zmq.FD)), self._pump), (self._monitor.fd, self._watch)):
            try:
                self._loop.add_reader(fd, ready)
            except NotImplementedError:
                raise ConfigurationError(
                    f"{type(self._loop).__name__} cannot watch a socket; run on a selector event loop"
                ) from None
            made.callback(self._loop.remove_reader, fd)
        self._dialer = Dialer(
            socket,
            endpoints,
            self.endpoint,
            rng,
            has_keys=credentials is not None,
            denied=self._receiver.link_denied,
            settled=lambda: not self._option(EVENTS) & POLLIN,
        )
        made.callback(self._dialer.close)
        self._dialer.start()

    @property
    def connected(self) -> bool:
        """Whether the controller is there, as far as is known."""
        return self._connected

    @property
    def trouble(self) -> str:
        """Why the last try to connect failed, in words; "" if it did not."""
        return self._dialer.trouble

    @property
    def congested(self) -> bool:
        """Whether sends are being held back because the pipe is full."""
        return bool(self._outbox)

    @property
    def several(self) -> bool:
        """Whether there is more than one controller to go to, as far as is known."""
        return self._dialer.several

    def move_on(self) -> None:
        """Leave this controller for the next one."""
        if not self._closed and self._dialer.leave():
            self._lost()
            self._receiver.link_idle()

    def counted(self) -> dict[str, int]:
        """What the link counted."""
        return asdict(self.figures)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send in order. What the pipe does not take waits here until it does, or the connection is lost."""
        if not self._connected:
            return
        if self._outbox:
            self._outbox.extend(messages)
            return
        send, figures = self._send, self.figures
        pending = iter(messages)
        for header, body in pending:
            try:
                if header[0] in WITH_BODY:
                    self._send_both(header, body)
                else:
                    send(header, LAST)
                figures.sent_bytes += len(header) + len(body)
            except zmq.Again:
                self._outbox.append((header, body))
                self._outbox.extend(pending)
                self._retry_later()
        self._check()

    def _send_both(self, header: bytes, body: bytes) -> None:
        """Send a message of two frames. Raises: zmq.Again if the pipe is full."""
        self._send(header, MORE)
        # The pipe took the first frame, so it takes the second; unless the connection went in between, and took both along.
        with contextlib.suppress(zmq.Again):
            self._send(body, LAST, len(body) < _COPY_BYTES_MAX)

    def _retry_later(self) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(self._retry_ms / 1_000, self._drain)

    def _drain(self) -> None:
        """Try what waits: one vain try if the pipe is still full, and the next one later."""
        self._retry = None
        waiting = self._outbox
        if self._closed or not waiting:
            return
        before = len(waiting)
        with contextlib.suppress(zmq.Again):
            while waiting:
                header, body = waiting[0]
                if header[0] in WITH_BODY:
                    self._send_both(header, body)
                else:
                    self._send(header, LAST)
                self.figures.sent_bytes += len(header) + len(body)
                waiting.popleft()
        if waiting:
            moved = len(waiting) < before
            self._retry_ms = (
                limits.CONGESTED_RETRY_MS if moved else min(self._retry_ms * 2, limits.CONGESTED_RETRY_MAX_MS)
            )
            self._retry_later()
        else:
            self._retry_ms = limits.CONGESTED_RETRY_MS
            self._receiver.link_idle()
        self._check()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Read what is there, up to a bound, then let the loop turn.

        The first message is read alone, since there is rarely a second: to ask for another costs less than a vain read.
        A vain read or question leaves the descriptor armed, so nothing has to be asked after it.
        """
        self._scheduled = False
        if self._closed:
            return
        self._pumps += 1
        unread = True
        try:
            unread = self._read(1) and bool(self._option(EVENTS) & POLLIN)
            if unread and not self._closed:
                unread = self._read(limits.BURST_MESSAGES_MAX)
        finally:
            if not self._closed:
                self._receiver.link_idle()
                if unread:
                    self._check()

    def _read(self, count_max: int) -> bool:
        """Hand on up to so many messages. False if there were fewer."""
        receive, handle, figures = self._receive, self._receiver.link_message, self.figures
        try:
            for _ in range(count_max):
                # A zmq.Frame knows whether another follows; to ask the socket costs more.
                first = receive(LAST, False)
                header: bytes = first.bytes
                figures.received_bytes += len(header)
                if first.more or (header and header[0] in WITH_BODY):
                    self._read_rest(header, first)
                else:
                    handle(header, EMPTY)
                if self._closed:
                    return False
        except zmq.Again:
            return False
        return True

    def _read_rest(self, header: bytes, first: zmq.Frame) -> None:
        """Hand on a message whose first frame is read, and which has more of them, or ought to."""
        last, body = first, EMPTY
        has_body = bool(header) and header[0] in WITH_BODY
        if has_body and first.more:
            last = self._receive(LAST, False)
            body = last.bytes
            self.figures.received_bytes += len(body)
        if last.more or (has_body and last is first):
            self.figures.malformed += 1
            body = EMPTY
            while last.more:
                last = self._receive(LAST, False)
            if not has_body:
                return
        self._receiver.link_message(header, body)

    def _check(self) -> None:
        """Come back if messages are there that no edge will announce."""
        if not self._scheduled and not self._closed and self._option(EVENTS) & POLLIN:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def _rescue(self) -> None:
        if self._closed:
            return
        waiting = bool(self._option(EVENTS) & POLLIN)
        if waiting and self._seen == self._pumps:
            self.figures.rescued += 1
            self._pump()
        # Something that waits now is only late if the pump has not run by the next look, which then is a short one.
        self._seen = self._pumps if waiting else -1
        self._watch()
        self._watchdog = self._loop.call_later(_RECHECK_S if waiting else _WATCHDOG_S, self._rescue)

    def _watch(self) -> None:
        """Connections came or went."""
        if self._closed:
            return
        for happened, _ in self._monitor.read():
            news = self._dialer.handle(happened)
            if news is Happened.UP:
                self._connected = True
                self.figures.connections += 1
                self._receiver.link_up()
            elif news is Happened.DOWN:
                self._lost()
            if self._closed:
                return
        self._receiver.link_idle()
        self._check()

    def _lost(self) -> None:
        self._connected = False
        self._outbox.clear()
        self._retry_ms = limits.CONGESTED_RETRY_MS
        self._receiver.link_down()

    def close(self) -> None:
        """Close the socket. What libzmq has not sent by then is lost: say goodbye first."""
        if self._closed:
            return
        self._closed = True
        self._connected = False
        self._watchdog.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._made.close()
