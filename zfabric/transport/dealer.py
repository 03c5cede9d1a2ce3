"""A client's or worker's socket on an asyncio loop: one pump that owns the socket's events.

libzmq's file descriptor is edge-triggered, and a send may consume the edge that announced a message. So the pump reads
until nothing is left, in bounded bursts, and every send is followed by the same check. `zmq.asyncio` is not used: its
futures cost more than the messages they carry.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import zmq

from zfabric import limits
from zfabric.transport.calls import EVENTS, LAST, MORE, POLLIN, calls_of
from zfabric.transport.context import make_context
from zfabric.transport.curve import Credentials
from zfabric.transport.endpoints import check_endpoint
from zfabric.transport.monitor import DENIED, UP, Monitor
from zfabric.transport.options import set_dealer_options
from zfabric.wire.codec import EMPTY
from zfabric.wire.kinds import WITH_BODY

#: A check that nothing was left behind by a missed edge; it has nothing to do, and counts if it had.
_WATCHDOG_S: Final = 0.25
_RECHECK_S: Final = 0.01
#: Copying less than this is cheaper than lending libzmq the bytes.
_COPY_BYTES_MAX: Final = 64 * 1024


class Receiver(Protocol):
    """Who drives the link."""

    def link_up(self) -> None:
        """The controller is connected."""

    def link_down(self) -> None:
        """The connection is gone; libzmq tries again by itself, for ever."""

    def link_denied(self) -> None:
        """The controller does not know this peer's key."""

    def link_message(self, header: bytes, body: bytes) -> None:
        """A message came."""

    def link_idle(self) -> None:
        """All messages that were there have been handled: time to send what they led to."""


@dataclass(slots=True)
class DealerFigures:
    """What the link counted."""

    malformed: int = 0
    rescued: int = 0
    connections: int = 0


class DealerLink:
    """One DEALER, connected to one endpoint.

    Args:
        endpoint: The controller's.
        receiver: Told what comes.
        rng: Chance, for the jitter of reconnects.
        credentials: Keys for a controller that wants them.
    """

    def __init__(
        self, endpoint: str, receiver: Receiver, rng: random.Random, credentials: Credentials | None = None
    ) -> None:
        self.endpoint = check_endpoint(endpoint)
        self.figures = DealerFigures()
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._context = make_context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        set_dealer_options(self._socket, rng, credentials)
        self._send, self._receive, self._option = calls_of(self._socket)
        self._monitor = Monitor(self._socket)
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._connected = False
        self._scheduled = False
        self._closed = False
        self._pumps = 0
        self._seen = -1
        self._retry: asyncio.TimerHandle | None = None
        self._fds = (int(self._socket.getsockopt(zmq.FD)), self._monitor.fd)
        self._loop.add_reader(self._fds[0], self._pump)
        self._loop.add_reader(self._fds[1], self._watch)
        self._watchdog = self._loop.call_later(_WATCHDOG_S, self._rescue)
        self._socket.connect(endpoint)

    @property
    def connected(self) -> bool:
        """Whether the controller is there, as far as is known."""
        return self._connected

    @property
    def congested(self) -> bool:
        """Whether sends are being held back because the pipe is full."""
        return bool(self._outbox)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send in order. What the pipe does not take waits here until it does, or the connection is lost."""
        if not self._connected:
            return
        waiting = self._outbox
        send = self._send
        for header, body in messages:
            if waiting:
                waiting.append((header, body))
                continue
            try:
                send(header, MORE if body else LAST)
            except zmq.Again:
                waiting.append((header, body))
                self._retry_later()
                continue
            if body:
                send(body, LAST, len(body) < _COPY_BYTES_MAX)
        self._check()

    def _retry_later(self) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(limits.CONGESTED_RETRY_MS / 1_000, self._drain)

    def _drain(self) -> None:
        self._retry = None
        waiting, self._outbox = self._outbox, deque()
        if not self._closed:
            self.send_all(waiting)
            if not self._outbox:
                self._receiver.link_idle()

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Read what is there, up to a bound, then let the loop turn.

        The first message is read alone, since there is rarely a second: to ask for another costs less than a vain read.
        """
        self._scheduled = False
        if self._closed:
            return
        self._pumps += 1
        if self._read(1) and self._option(EVENTS) & POLLIN and not self._closed:
            self._read(limits.BURST_MESSAGES_MAX)
        if not self._closed:
            self._receiver.link_idle()
            self._check()

    def _read(self, count_max: int) -> bool:
        """Hand on up to so many messages. False if there were fewer. Whether a body follows says the kind: the controller,
        the one sender here, is trusted to frame what it sends."""
        receive, handle = self._receive, self._receiver.link_message
        header = EMPTY
        try:
            for _ in range(count_max):
                header = receive(LAST)
                body = receive(LAST) if header and header[0] in WITH_BODY else EMPTY
                handle(header, body)
                if self._closed:
                    return False
                header = EMPTY
        except zmq.Again:
            self.figures.malformed += bool(header)
            return False
        return True

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
        for kind, _ in self._monitor.read():
            if kind == UP:
                self._connected = True
                self.figures.connections += 1
                self._receiver.link_up()
            elif kind == DENIED:
                self._receiver.link_denied()
            elif self._connected:
                self._connected = False
                self._outbox.clear()
                self._receiver.link_down()
        self._receiver.link_idle()
        self._check()

    def close(self) -> None:
        """Close the socket. What libzmq has not sent by then is lost: say goodbye first."""
        if self._closed:
            return
        self._closed = True
        self._connected = False
        for fd in self._fds:
            self._loop.remove_reader(fd)
        self._watchdog.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._monitor.close()
        self._socket.close(linger=50)
        self._context.term()
