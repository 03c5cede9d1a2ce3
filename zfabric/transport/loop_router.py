"""The controller's link on the event loop's own transports; see `links.RouterDriver`.

A lost connection is asyncio's `connection_lost`, a slow peer is its transport's buffer, and what leaves for a peer in one
turn is joined into one write: many small writes are dear on tcp.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import ClassVar

from zfabric import limits
from zfabric.ids import RoutingId
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.context import file_limit
from zfabric.transport.curve import ControllerKeys
from zfabric.transport.handshakes import Handshakes as FailedHandshakes
from zfabric.transport.links import Log, RouterReceiver, Routes, silent
from zfabric.transport.loop_accept import Acceptor
from zfabric.transport.loop_addresses import listen
from zfabric.transport.loop_mechanisms import RouterConnections
from zfabric.transport.loop_peer import Peer
from zfabric.transport.loop_waiting import Admission
from zfabric.transport.loop_wire import ByteCount
from zfabric.transport.monitor import Happened
from zfabric.transport.spin import Spinner
from zfabric.wire.codec import EMPTY
from zfabric.zmtp import z85


class LoopRouter:
    """Any number of listeners, and a peer a connection.

    Args:
        endpoints: Where to listen.
        routes: Where chunks go.
        receiver: Told what comes.
        keys: Encrypt, and let only known keys in; None lets everybody in.
        log: Called when something is wrong with the listeners.
        spin_us: Look for more for so long after each read before the loop sleeps; 0 is not at all.
        other_users: Take ipc connections of other users as well.

    Raises:
        EndpointInUseError: Somebody has an endpoint.
        ConfigurationError: An endpoint cannot be bound, or a key is none.
    """

    bounds_messages: ClassVar[bool] = True

    def __init__(
        self,
        endpoints: tuple[str, ...],
        routes: Routes,
        receiver: RouterReceiver,
        keys: ControllerKeys | None = None,
        log: Log = silent,
        *,
        spin_us: int = 0,
        other_users: bool = False,
    ) -> None:
        self.file_limit = file_limit()
        self.is_known: Callable[[RoutingId], bool] = lambda _: True
        self.routes = routes
        self.receiver = receiver
        #: Peers with something to be sent when the turn is over.
        self.dirty: list[Peer] = []
        self.peers: dict[RoutingId, Peer] = {}
        self.malformed = self.unroutable = self.overflowed = self.protocol_errors = 0
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self.spinner = Spinner(self._loop, spin_us) if spin_us else None
        self.moved = ByteCount()
        self._connections = RouterConnections(keys)
        self._failures = FailedHandshakes(has_keys=keys is not None)
        self._all: set[Peer] = set()
        self._held = contextlib.ExitStack()
        self._acceptors: list[Acceptor] = []
        self._log = log
        self._other_users = other_users
        self._last = 0
        self._flush_due = False
        self._passed_ns = 0
        self._unflushed = 0
        self._overdue = 0
        self._working = False
        self._ticker = self._loop.call_later(limits.ZMTP_PING_MS / 1_000, self._tick)
        try:
            self.endpoints = tuple(self._listen(endpoint) for endpoint in endpoints)
        except BaseException:
            self._close_listeners()
            self._ticker.cancel()
            raise

    def _listen(self, endpoint: str) -> str:
        listeners, shown = listen(endpoint, self._held, other_users=self._other_users)
        for listener in listeners:
            self._acceptors.append(Acceptor(listener, self._make_peer, self._log, other_users=self._other_users))
        return shown

    # ── peers ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_peer(self, source: str, admission: Admission) -> Peer:
        peer = Peer(self, self._connections.make(), source, admission, self._loop)
        self._all.add(peer)
        return peer

    def admit(self, peer: Peer) -> RoutingId:
        """A handshake is over: the peer gets a name, five octets of which the first is zero, as libzmq's are."""
        while True:
            self._last = (self._last + 1) & 0xFFFF_FFFF
            name = RoutingId(b"\0" + self._last.to_bytes(4, "big"))
            if name not in self.peers:
                self.peers[name] = peer
                return name

    def gone(self, peer: Peer) -> None:
        """A connection is closed."""
        self._all.discard(peer)
        if not self.closed and peer.name and self.peers.pop(peer.name, None) is not None:
            self.receiver.link_lost(peer.name)
            self.settle()

    def handshake_failed(self, what: Happened) -> None:
        """A connection got no further: count it, and tell the operator what has to be mended."""
        self._failures.note(what)
        self._tell_failures()

    def _tell_failures(self) -> None:
        for reason, count in self._failures.due(monotonic_ns()):
            self._log("handshake_failed", reason=reason, count=count)

    def lose(self, peer: RoutingId) -> None:
        """A peer does not read, or is not there any more: it is told to the receiver."""
        self.forget(peer)
        if not self.closed:
            self.receiver.link_lost(peer)
            self._loop.call_soon(self.settle)

    def forget(self, peer: RoutingId) -> None:
        """Drop a peer, and its connection if there is one."""
        found = self.peers.pop(peer, None)
        if found is not None:
            found.abort()

    def key_of(self, peer: RoutingId) -> bytes:
        """The public key (Z85) that a peer has proved; empty without encryption."""
        found = self.peers.get(peer)
        return z85.encode(found.key) if found is not None and found.key else b""

    def keyed(self) -> dict[RoutingId, bytes]:
        """All peers whose keys are known, and their keys."""
        return {name: z85.encode(peer.key) for name, peer in self.peers.items() if peer.key}

    def cut(self, peer: RoutingId) -> None:
        """Close a peer's connection, when it has read what was sent before, or soon without."""
        found = self.peers.get(peer)
        if found is not None:
            found.flush()
            found.close()

    def buffered(self, peer: RoutingId) -> int:
        """Bytes that wait for a peer."""
        found = self.peers.get(peer)
        return found.buffered if found is not None else 0

    def counted(self) -> dict[str, int]:
        """What the link counted, and how much is kept now."""
        admissions = [acceptor.admission for acceptor in self._acceptors]
        return {
            "malformed": self.malformed,
            "unroutable": self.unroutable,
            "overflowed": self.overflowed,
            "protocol_errors": self.protocol_errors,
            "received_bytes": self.moved.received,
            "sent_bytes": self.moved.sent,
            "handshakes_failed": self._failures.failed,
            "connections": len(self.peers),
            "handshakes": sum(len(admission.handshakes) for admission in admissions),
            "handshakes_refused": sum(admission.refused for admission in admissions),
            "sessionless": sum(len(admission.sessionless) for admission in admissions),
            "sessionless_ended": self._overdue,
            "displaced": sum(admission.displaced for admission in admissions),
            "accepting_paused": sum(acceptor.pauses for acceptor in self._acceptors),
            "buffered_bytes": sum(peer.buffered for peer in self.peers.values() if peer.full),
        }

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, to: RoutingId, header: bytes, body: bytes = EMPTY) -> bool:
        """Send in order, at the end of this turn. False if the peer is gone, or too much is kept for it."""
        peer = self.peers.get(to)
        if peer is None:
            self.unroutable += 1
            return False
        if peer.full and peer.overflows():
            self.overflowed += 1
            self.forget(to)
            return False
        peer.put(header, body)
        if not self._working:
            self._flush_later()
        return True

    def take_waiting(self, then: Callable[[], None]) -> None:
        """Call back when the loop has looked at all connections once more."""
        # A timer's turn may come before the loop reads; what is called soon then, too. What that calls soon comes after.
        self._loop.call_soon(self._loop.call_soon, self._settle_after, then)

    def _settle_after(self, then: Callable[[], None]) -> None:
        if not self.closed:
            self._working = True
            then()
            self.settle()

    def begin(self) -> None:
        """A peer's bytes are being handled: what is sent meanwhile leaves when that is over."""
        self._working = True

    def settle(self) -> None:
        """What came has been handled: have the receiver send what it led to, and flush."""
        if not self.closed:
            self.receiver.link_idle()
        self.flush()

    def passed_on(self) -> None:
        """A read that led to nothing but chunks has been handled. One that comes alone is written at once. Where reads follow one
        another closely, what they brought for one reader is written together when the loop has looked at all connections, or
        at so many."""
        self._working = False
        if not self.dirty:
            return
        now_ns = monotonic_ns()
        alone = now_ns - self._passed_ns > limits.READS_TOGETHER_US * 1_000
        self._passed_ns = now_ns
        if alone or self._unflushed >= limits.READS_TOGETHER_MAX:
            self.flush()
            return
        self._unflushed += 1
        self._flush_later()

    def _flush_later(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_now)

    def flush(self) -> None:
        """Write what is due, a joined write a peer."""
        self._working = False
        self._unflushed = 0
        while self.dirty:
            dirty, self.dirty = self.dirty, []
            for peer in dirty:
                peer.flush()

    def _flush_now(self) -> None:
        self._flush_due = False
        self.flush()

    def now_ns(self) -> int:
        """When a worker was heard."""
        return monotonic_ns()

    # ── time, end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        self.flush()
        self._tell_failures()
        for peer in list(self.peers.values()):
            peer.tick()
        for acceptor in self._acceptors:
            for overdue in acceptor.admission.sessionless.overdue(limits.SESSIONLESS_MS):
                self._overdue += 1
                overdue.abort()
        self._ticker = self._loop.call_later(limits.ZMTP_PING_MS / 1_000, self._tick)

    def _close_listeners(self) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        self._held.close()

    async def close(self) -> None:
        """Let what was sent leave for a moment, then close all connections and listeners. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self.spinner is not None:
            self.spinner.close()
        self.flush()
        self._ticker.cancel()
        self._close_listeners()
        # Who was accepted a moment ago, and has no transport yet, is told of no end either.
        self._all = {peer for peer in self._all if peer.begun}
        for peer in list(self._all):
            peer.close()
        # Transports write what they have, and close, in the loop's next turns; those whose peer does not read are cut.
        deadline = self._loop.time() + limits.PARTING_MS / 1_000
        while self._all and self._loop.time() < deadline:  # noqa: ASYNC110 — the end of any number of peers, once
            await asyncio.sleep(0.001)
        for peer in list(self._all):
            peer.abort()
        await asyncio.sleep(0)
