"""The controller's socket: bursts in, sends out, and news of lost connections. Never blocks.

What ROUTER does not do, this does: a message is [routing id][header], or [routing id][header][body] for the kinds that
have one, read frame by frame so that no sender can shift the frames of the next; a send to a full pipe is parked, in
order and within bounds, and tried again; a disconnect, which libzmq reports by file descriptor,
is traced to the peers of that descriptor and confirmed by a probe, so that a death is known within a millisecond.

What it cannot do: a message without end. libzmq keeps the frames of a message until its last one has come, and bounds the size
of a frame and the number of whole messages, but not the number of frames.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, cast

import zmq

from zfabric import limits
from zfabric.errors import ConfigurationError
from zfabric.ids import RoutingId
from zfabric.transport.calls import EVENTS, LAST, MORE, POLLIN, calls_of
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.context import file_limit, make_context, make_router
from zfabric.transport.curve import ControllerKeys, start_authenticator
from zfabric.transport.handshakes import Handshakes
from zfabric.transport.links import RelayReceiver, Routes
from zfabric.transport.listening import listen
from zfabric.transport.monitor import Happened, Monitor
from zfabric.transport.options import set_router_options
from zfabric.transport.parking import Parking, Sent
from zfabric.wire.codec import EMPTY, ROUTE_BYTES
from zfabric.wire.kinds import BEAT, CHUNKS, CLIENT_HELLO, WITH_BODY, WORKER_HELLO

#: Copying less than this is cheaper than keeping libzmq's buffer.
_COPY_BYTES_MAX: Final = 64 * 1024
_CHUNKS: Final = bytes([CHUNKS])
_HELLOS: Final = frozenset({CLIENT_HELLO, WORKER_HELLO})
_PROBE: Final = (bytes([BEAT]) + b"\x91\x00", EMPTY)


@dataclass(slots=True)
class RouterFigures:
    """What the link counted.

    Attributes:
        malformed: Messages with a wrong number of frames.
        unroutable: Sends to peers that turned out to be gone.
        parked: Messages that had to wait for a reader.
        overflowed: Peers that had more waiting than they may.
        probes: Peers asked whether their connection is the one that was lost.
        handshakes_failed: Connections that got no further.
        buffered_peers, buffered_bytes: Readers that do not read now, and what waits for them.
        buffered_peer_bytes_max: The most that one of them has had.
        received_bytes, sent_bytes: What the frames of messages hold.
    """

    malformed: int = 0
    unroutable: int = 0
    parked: int = 0
    overflowed: int = 0
    probes: int = 0
    handshakes_failed: int = 0
    buffered_peers: int = 0
    buffered_bytes: int = 0
    buffered_peer_bytes_max: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


class RouterLink:
    """One ROUTER, bound to any number of endpoints.

    Args:
        endpoints: Where to listen. An ipc socket is guarded by a lock, since libzmq would silently steal it.
        keys: Encrypt, and let only known keys in; None lets everybody in.

    Attributes:
        is_known: Whether a peer has a session. One that has none may have less parked.
        file_limit: How many files this process may have open, None where that is not known.

    Raises:
        EndpointInUseError: Another controller has the endpoint.
        ConfigurationError: The endpoint cannot be bound, a key cannot be used, or the system gives no socket.
    """

    #: Whether a message of too many frames ends its connection before all of them were kept.
    bounds_messages: ClassVar[bool] = False

    def __init__(self, endpoints: tuple[str, ...], keys: ControllerKeys | None = None) -> None:
        self.is_known: Callable[[RoutingId], bool] = lambda _: True
        self.file_limit = file_limit()
        self._figures = RouterFigures()
        self._handshakes = Handshakes(has_keys=keys is not None)
        self._parking = Parking(self._offer)
        self._relayed = 0
        self._dropping = False
        self._descriptors: dict[int, set[RoutingId]] = {}
        self._descriptor_of: dict[RoutingId, int] = {}
        #: Without keys libzmq's handler calls everybody "anonymous".
        self._guarded = keys is not None
        self._keys: dict[RoutingId, bytes] = {}
        self._suspects: list[tuple[int, RoutingId]] = []
        with contextlib.ExitStack() as made:
            try:
                self._make(made, endpoints, keys)
            except zmq.ZMQError as error:
                raise ConfigurationError(f"no socket for {', '.join(endpoints)} can be made: {error}") from error
            self._made = made.pop_all()

    def _make(self, made: contextlib.ExitStack, endpoints: tuple[str, ...], keys: ControllerKeys | None) -> None:
        """Make all that has to be freed again, and note how."""
        # Others may have an ipc socket's path only when this one is closed.
        held = made.enter_context(contextlib.ExitStack())
        context = make_context()
        made.callback(context.destroy, linger=0)
        made.callback(start_authenticator(context, keys).stop)
        self._socket = make_router(context)
        made.callback(self._socket.close, linger=0)
        set_router_options(self._socket, keys)
        self._send, self._receive, self._option = calls_of(self._socket)
        self._monitor = Monitor(self._socket)
        made.callback(self._monitor.close)
        #: Where it listens, with the ports that were chosen.
        self.endpoints = tuple(listen(self._socket, endpoint, held) for endpoint in endpoints)

    @property
    def fd(self) -> int:
        """Readable when messages may have arrived (edge-triggered: ask `readable` after every burst)."""
        return int(self._socket.getsockopt(zmq.FD))

    @property
    def monitor_fd(self) -> int:
        """Readable when connections may have come or gone (edge-triggered)."""
        return self._monitor.fd

    @property
    def figures(self) -> RouterFigures:
        """What was counted until now."""
        figures, parking = self._figures, self._parking
        figures.handshakes_failed = self._handshakes.failed
        figures.buffered_peers = len(parking.peers)
        figures.buffered_bytes = parking.total_bytes
        figures.buffered_peer_bytes_max = parking.peer_bytes_max
        # Most bytes come and go, so they are counted once.
        figures.received_bytes += self._relayed
        figures.sent_bytes += self._relayed
        self._relayed = 0
        return figures

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def relay(self, routes: Routes, receiver: RelayReceiver, now_ns: int, count_max: int) -> None:
        """Read up to so many messages that are there now: chunks are passed on, the others are handed over, in order.

        This is the only loop over messages, so it is written out: each call in it would be a tenth of a message's cost.

        Args:
            routes: By sender and the first bytes of the message, where chunks go. What has no route is handed over.
            receiver: Who takes the other messages, and hears of readers that turned out to be gone.
            now_ns: When the worker whose chunks these are was heard.
        """
        receive, send, route_of = self._receive, self._send, routes.get
        parked = self._parking.peers
        if self._dropping and not self._drop():
            return
        for _ in range(count_max):
            try:
                sender: RoutingId = receive(LAST)
            except zmq.Again:
                return
            # A zmq.Frame knows whether another follows; to ask the socket costs four times as much.
            first = receive(LAST, False)
            header: bytes = first.bytes
            if header[:1] != _CHUNKS or first.more:
                self._receive_rest(sender, header, first, receiver)
                if self._dropping:
                    return
                continue
            route = route_of(sender + header[:ROUTE_BYTES])
            if route is None:
                self._figures.received_bytes += len(header)
                receiver.link_message(sender, header, EMPTY)
                continue
            route.worker.heard_ns = now_ns
            client = route.client
            if parked and client in parked:
                there = self._park(client, header, EMPTY)
            else:
                try:
                    send(client, MORE)
                except zmq.ZMQError as error:
                    there = self._not_sent(error, client, header, EMPTY)
                else:
                    send(header, LAST)
                    self._relayed += len(header)
                    continue
            # Rare: the reader's pipe is full, or the reader is gone.
            self._figures.received_bytes += len(header)
            if not there:
                receiver.link_lost(client)

    def _receive_rest(self, sender: RoutingId, header: bytes, first: zmq.Frame, receiver: RelayReceiver) -> None:
        """Hand over a message whose first frame is read."""
        kind = header[0] if header else 0
        last, body = first, EMPTY
        has_body = kind in WITH_BODY
        if has_body and first.more:
            last = self._receive(LAST, False)
            # A large body is not copied; it goes on as the frame that it is.
            body = last.bytes if len(last) < _COPY_BYTES_MAX else cast(bytes, last)
        elif kind in _HELLOS:
            self._note_peer(sender, first)
        self._figures.received_bytes += len(header) + len(body)
        if last.more or (has_body and last is first):
            self._figures.malformed += 1
            if last.more:
                self._drop()
            receiver.link_malformed(sender, header)
        else:
            receiver.link_message(sender, header, body)

    def _drop(self) -> bool:
        """Read frames that do not belong where they are, up to a bound, and forget them. False if more of them follow: then
        nothing else can be read, and the next burst goes on with them."""
        for _ in range(limits.DROPPED_FRAMES_MAX):
            if not self._receive(LAST, False).more:
                self._dropping = False
                return True
        self._dropping = True
        return False

    def readable(self) -> bool:
        """Whether more is there. Also re-arms the file descriptor's edge."""
        return bool(self._option(EVENTS) & POLLIN)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, to: RoutingId, header: bytes, body: bytes = EMPTY) -> bool:
        """Send, or park if the peer's pipe is full. False if the peer is gone, or parks more than it may.

        The kind says whether the body is a frame; an empty one is a frame as well.
        """
        if to in self._parking.peers:
            return self._park(to, header, body)
        try:
            self._send(to, MORE)
        except zmq.ZMQError as error:
            return self._not_sent(error, to, header, body)
        self._send_rest(header, body)
        return True

    def _send_rest(self, header: bytes, body: bytes) -> None:
        """The pipe took the address, so it takes the whole message."""
        send = self._send
        self._figures.sent_bytes += len(header) + len(body)
        if header[0] in WITH_BODY:
            send(header, MORE)
            send(body, LAST, type(body) is bytes)
        else:
            send(header, LAST)

    def _not_sent(self, error: zmq.ZMQError, to: RoutingId, header: bytes, body: bytes) -> bool:
        if error.errno == zmq.EAGAIN:
            return self._park(to, header, body)
        if error.errno != zmq.EHOSTUNREACH:
            raise error
        self._figures.unroutable += 1
        return False

    def _park(self, to: RoutingId, header: bytes, body: bytes) -> bool:
        bytes_max = limits.PARKED_BYTES_MAX if self.is_known(to) else limits.PARKED_STRANGER_BYTES_MAX
        if self._parking.park(to, header, body, bytes_max, monotonic_ns()):
            self._figures.parked += 1
            return True
        self._figures.overflowed += 1
        self.forget(to)
        return False

    def _offer(self, to: RoutingId, header: bytes, body: bytes) -> Sent:
        """Try to send what was parked."""
        try:
            self._send(to, MORE)
        except zmq.ZMQError as error:
            if error.errno == zmq.EAGAIN:
                return Sent.FULL
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._figures.unroutable += 1
            return Sent.GONE
        self._send_rest(header, body)
        return Sent.DONE

    def next_retry_ns(self) -> int | None:
        """When `retry_parked` is due, None while nothing is parked."""
        return self._parking.next_ns()

    def retry_parked(self, now_ns: int) -> list[RoutingId]:
        """Send what was parked and is due, as far as it goes. Returns peers that are gone."""
        return self._parking.retry(now_ns)

    def buffered(self, peer: RoutingId) -> int:
        """Bytes that are parked for a peer; what libzmq holds in its pipe is not known."""
        waiting = self._parking.peers.get(peer)
        return waiting.size if waiting is not None else 0

    def forget(self, peer: RoutingId) -> None:
        """Drop what is parked and known of a peer."""
        self._parking.forget(peer)
        self._keys.pop(peer, None)
        descriptor = self._descriptor_of.pop(peer, None)
        if descriptor is not None:
            peers = self._descriptors.get(descriptor)
            if peers is not None:
                peers.discard(peer)
                if not peers:
                    del self._descriptors[descriptor]

    # ── lost connections ────────────────────────────────────────────────────────────────────────────────────────────

    def key_of(self, peer: RoutingId) -> bytes:
        """The public key (Z85) of a peer that has said HELLO; empty without encryption."""
        return self._keys.get(peer, b"")

    def keyed(self) -> dict[RoutingId, bytes]:
        """All peers that have said HELLO, and their keys; those that have not are not known."""
        return dict(self._keys)

    def cut(self, peer: RoutingId) -> None:
        """Shut a peer's connection down, as if the peer had: libzmq itself closes no connection of a ROUTER's. One whose
        descriptor is not known for sure is left alone."""
        descriptor = self._descriptor_of.get(peer)
        if descriptor is None or self._descriptors.get(descriptor) != {peer} or not self._probe(peer, monotonic_ns()):
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as shared:
            shared.shutdown(socket.SHUT_RDWR)

    def _note_peer(self, peer: RoutingId, frame: zmq.Frame) -> None:
        with contextlib.suppress(zmq.ZMQError, ValueError):
            if self._guarded:
                self._keys[peer] = str(frame.get("User-Id")).encode()
        with contextlib.suppress(zmq.ZMQError, ValueError):
            descriptor = int(frame.get("__fd"))
            self._descriptors.setdefault(descriptor, set()).add(peer)
            self._descriptor_of[peer] = descriptor

    def lost_connections(self, now_ns: int) -> list[RoutingId]:
        """Peers that turned out to be gone. Call when `monitor_fd` is readable, and when `suspects` is due.

        A descriptor may have been given to a new connection already, and the pipe closes a moment after the event, so
        every suspect is probed: only an unroutable one is gone. A probe that arrives is a beat, which does no harm.
        """
        for happened, descriptor in self._monitor.read():
            if happened is Happened.DOWN:
                for peer in self._descriptors.get(descriptor, ()):
                    self._suspects += [(now_ns + int(ms * 1e6), peer) for ms in (0.0, *limits.PROBE_RETRY_MS)]
            elif happened is not Happened.UP:
                self._handshakes.note(happened)
        if not self._suspects:
            return []
        due = [peer for at_ns, peer in self._suspects if at_ns <= now_ns]
        self._suspects = [(at_ns, peer) for at_ns, peer in self._suspects if at_ns > now_ns]
        gone: dict[RoutingId, None] = {}
        for peer in due:
            self._figures.probes += 1
            if peer in self._descriptor_of and peer not in gone and not self._probe(peer, now_ns):
                gone[peer] = None
        if gone:
            self._suspects = [entry for entry in self._suspects if entry[1] not in gone]
        return list(gone)

    def _probe(self, peer: RoutingId, now_ns: int) -> bool:
        """Whether a peer's connection is still there. What is parked for it is as good a probe as any."""
        if peer in self._parking.peers:
            return self._parking.retry_one(peer, now_ns)
        return self.send(peer, *_PROBE)

    def next_probe_ns(self) -> int | None:
        """When `lost_connections` is due again, None for not before the next event."""
        return min((at_ns for at_ns, _ in self._suspects), default=None)

    def failed_handshakes(self, now_ns: int) -> list[tuple[str, int]]:
        """Reasons why peers could not connect that are to be logged now, each with how often since the last time."""
        return self._handshakes.due(now_ns)

    def close(self) -> None:
        """Close the socket and give up the endpoints. Safe to call twice."""
        self._made.close()
