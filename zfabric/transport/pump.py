"""What libzmq's ROUTER needs on an event loop; see `links.RouterDriver`.

Its file descriptor is edge-triggered, so every burst ends with a look for more, and a watchdog looks for missed edges; it
tells of no peer that has room again, so what is parked is tried again; and it names lost connections by file descriptor
only, so suspects are probed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import ClassVar, Final

from zfabric import limits
from zfabric.ids import RoutingId
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.curve import ControllerKeys
from zfabric.transport.links import Log, RouterReceiver, Routes, silent
from zfabric.transport.loop_timer import LoopTimer
from zfabric.transport.router import RouterLink
from zfabric.wire.codec import EMPTY

#: A look for messages whose edge was missed; it has nothing to do, and counts if it had.
_WATCHDOG_S: Final = 0.25
_RECHECK_S: Final = 0.01
#: Farewells leave libzmq's pipes within this time, or not at all: sockets do not linger.
_FAREWELL_S: Final = 0.02


class PumpedRouter:
    """A `RouterLink` on the running loop.

    Args:
        endpoints, keys: As of `RouterLink`, and so are its errors.
        routes: Where chunks go.
        receiver: Told what comes.
        log: Told of handshakes that failed.
    """

    bounds_messages: ClassVar[bool] = RouterLink.bounds_messages

    def __init__(
        self,
        endpoints: tuple[str, ...],
        routes: Routes,
        receiver: RouterReceiver,
        keys: ControllerKeys | None = None,
        log: Log = silent,
    ) -> None:
        self._link = link = RouterLink(endpoints, keys)
        self.endpoints = link.endpoints
        self.file_limit = link.file_limit
        self.key_of = link.key_of
        self.keyed = link.keyed
        self.forget = link.forget
        self.buffered = link.buffered
        self._routes = routes
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._rescued = 0
        self._closed = False
        self._busy = False
        self._pump_due = self._check_due = False
        self._pumps = 0
        self._seen = -1
        self._probe_timer = LoopTimer(self._loop, self._check_connections)
        self._retry_timer = LoopTimer(self._loop, self._retry_parked)
        self._fds = (link.fd, link.monitor_fd)
        self._loop.add_reader(self._fds[0], self._pump)
        self._loop.add_reader(self._fds[1], self._connections_changed)
        self._watchdog = self._loop.call_later(_WATCHDOG_S, self._rescue)
        self._pump_later()

    @property
    def is_known(self) -> Callable[[RoutingId], bool]:
        """Whether a peer has a session."""
        return self._link.is_known

    @is_known.setter
    def is_known(self, answer: Callable[[RoutingId], bool]) -> None:
        self._link.is_known = answer

    def counted(self) -> dict[str, int]:
        """What the link counted."""
        return {**asdict(self._link.figures), "rescued": self._rescued}

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Take one burst of what has arrived."""
        self._pump_due = False
        if self._closed:
            return
        self._pumps += 1
        self._busy = True
        self._read()
        self._settle()

    def _read(self) -> None:
        link, now_ns = self._link, monotonic_ns()
        # The first message is taken alone, since there is rarely a second: to ask for more costs less than a vain read.
        for count_max in (1, limits.BURST_MESSAGES_MAX):
            link.relay(self._routes, self._receiver, now_ns, count_max)
            if not link.readable():
                break

    def _settle(self) -> None:
        """Have the receiver send, and make sure that no message waits unseen."""
        self._receiver.link_idle()
        self._busy = False
        self._check()

    def _check(self) -> None:
        """A send may have filled a pipe, or consumed the edge that announced a message."""
        self._check_due = False
        if self._closed:
            return
        self._retry_timer.arm(self._link.next_retry_ns(), monotonic_ns())
        if not self._pump_due and self._link.readable():
            self._pump_later()

    def _pump_later(self) -> None:
        self._pump_due = True
        self._loop.call_soon(self._pump)

    def take_waiting(self, then: Callable[[], None]) -> None:
        """Hand over what has arrived, up to a burst, then call back."""
        if not self._closed:
            self._busy = True
            self._read()
            then()
            self._settle()

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, to: RoutingId, header: bytes, body: bytes = EMPTY) -> bool:
        """Send, or park if the peer's pipe is full. False if the peer is gone, or parks more than it may."""
        if not self._busy and not self._check_due:
            self._check_due = True
            self._loop.call_soon(self._check)
        return self._link.send(to, header, body)

    def _retry_parked(self) -> None:
        if not self._closed:
            self._tell_lost(self._link.retry_parked(monotonic_ns()))

    def cut(self, peer: RoutingId) -> None:
        """Close a peer's connection, when it has had the time to read what was sent before."""
        self._loop.call_later(limits.LAST_WORDS_MS / 1_000, self._cut, peer)

    def _cut(self, peer: RoutingId) -> None:
        if not self._closed:
            self._link.cut(peer)

    # ── lost connections and edges ──────────────────────────────────────────────────────────────────────────────────

    def _tell_lost(self, peers: list[RoutingId]) -> None:
        self._busy = True
        for peer in peers:
            self._link.forget(peer)
            self._receiver.link_lost(peer)
        self._settle()

    def _connections_changed(self) -> None:
        """Connections came or went. Who is gone may have said something before, and be it goodbye: that is read first."""
        if not self._closed:
            self._busy = True
            self._read()
            self._check_connections()

    def _check_connections(self) -> None:
        """Take the news of connections, and probe those that are suspected to be gone."""
        if self._closed:
            return
        now_ns = monotonic_ns()
        gone = self._link.lost_connections(now_ns)
        for reason, count in self._link.failed_handshakes(now_ns):
            self._log("handshake_failed", reason=reason, count=count)
        self._probe_timer.arm(self._link.next_probe_ns(), now_ns)
        self._tell_lost(gone)

    def _rescue(self) -> None:
        waiting = self._link.readable()
        if waiting and self._seen == self._pumps:
            self._rescued += 1
            self._pump()
        # Something that waits now is only late if the pump has not run by the next look, which then is a short one.
        self._seen = self._pumps if waiting else -1
        self._check_connections()
        self._watchdog = self._loop.call_later(_RECHECK_S if waiting else _WATCHDOG_S, self._rescue)

    async def close(self) -> None:
        """Let what was sent leave for a moment, then close. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for fd in self._fds:
            self._loop.remove_reader(fd)
        for timer in (self._probe_timer, self._retry_timer):
            timer.cancel()
        self._watchdog.cancel()
        try:
            await asyncio.sleep(_FAREWELL_S)
        finally:
            self._link.close()
