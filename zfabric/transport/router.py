"""The controller's socket: bursts in, sends out, and news of lost connections. Never blocks.

What ROUTER does not do, this does: a message is [routing id][header], or [routing id][header][body] for the kinds that
have one, read frame by frame so that no sender can shift the frames of the next; a send to a full pipe is parked, in
order and within bounds, and tried again; a disconnect, which libzmq reports by file descriptor,
is traced to the peers of that descriptor and confirmed by a probe, so that a death is known within a millisecond.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Final, Protocol, cast

import zmq

from zfabric import limits
from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.ids import RoutingId
from zfabric.transport.calls import EVENTS, LAST, MORE, POLLIN, calls_of
from zfabric.transport.context import make_context, raise_file_limit
from zfabric.transport.curve import ControllerKeys, start_authenticator
from zfabric.transport.endpoints import ipc_path, prepare_ipc_directory
from zfabric.transport.monitor import DOWN, Monitor
from zfabric.transport.options import set_router_options
from zfabric.wire.codec import EMPTY, ROUTE_BYTES
from zfabric.wire.kinds import BEAT, CHUNKS, CLIENT_HELLO, WITH_BODY, WORKER_HELLO

#: Copying less than this is cheaper than keeping libzmq's buffer.
_COPY_BYTES_MAX: Final = 64 * 1024
_CHUNKS: Final = bytes([CHUNKS])
_HELLOS: Final = frozenset({CLIENT_HELLO, WORKER_HELLO})
_PROBE: Final = (bytes([BEAT]) + b"\x91\x00", EMPTY)


@dataclass(slots=True)
class RouterFigures:
    """What the link counted."""

    malformed: int = 0
    unroutable: int = 0
    parked: int = 0
    overflowed: int = 0
    probes: int = 0


class Heard(Protocol):
    """A peer whose lease its messages renew."""

    heard_ns: int


class Route(Protocol):
    """Where chunks go, and who sends them."""

    @property
    def client(self) -> RoutingId: ...
    @property
    def worker(self) -> Heard: ...


class Receiver(Protocol):
    """Who takes what is not passed on."""

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        """A message came. A large body is where libzmq has it (a zmq.Frame), to be passed on."""

    def link_lost(self, peer: RoutingId) -> None:
        """The reader of a chunk is gone."""


class RouterLink:
    """One ROUTER, bound to any number of endpoints.

    Args:
        endpoints: Where to listen. An ipc socket is guarded by a lock, since libzmq would silently steal it.
        keys: Encrypt, and let only known keys in; None lets everybody in.

    Raises:
        EndpointInUseError: Another controller has the endpoint.
        ConfigurationError: The endpoint cannot be bound.
    """

    def __init__(self, endpoints: tuple[str, ...], keys: ControllerKeys | None = None) -> None:
        self.figures = RouterFigures()
        self.file_limit = raise_file_limit()
        self._locks: list[tuple[IO[str], str]] = []
        self._context = make_context()
        self._authenticator = start_authenticator(self._context, keys)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        set_router_options(self._socket, keys)
        self._send, self._receive, self._option = calls_of(self._socket)
        self._monitor = Monitor(self._socket)
        self._descriptors: dict[int, set[RoutingId]] = {}
        self._descriptor_of: dict[RoutingId, int] = {}
        self._keys: dict[RoutingId, bytes] = {}
        self._parked: dict[RoutingId, deque[tuple[bytes, bytes]]] = {}
        self._parked_bytes: dict[RoutingId, int] = {}
        self._suspects: list[tuple[int, RoutingId]] = []
        try:
            self.endpoints = tuple(self._bind(endpoint) for endpoint in endpoints)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """Readable when messages may have arrived (edge-triggered: ask `readable` after every burst)."""
        return int(self._socket.getsockopt(zmq.FD))

    @property
    def monitor_fd(self) -> int:
        """Readable when connections may have come or gone (edge-triggered)."""
        return self._monitor.fd

    def _bind(self, endpoint: str) -> str:
        path = ipc_path(endpoint)
        umask = os.umask(0o077)
        try:
            if path is not None:
                prepare_ipc_directory(path)
                self._lock(str(path))
            # With it on, an IPv4 endpoint would be bound, and told to peers, in its IPv6 form.
            self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE:
                raise EndpointInUseError(f"{endpoint} is in use by another process", endpoint=endpoint) from None
            raise ConfigurationError(f"{endpoint} cannot be bound: {error}", endpoint=endpoint) from None
        finally:
            os.umask(umask)
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def _lock(self, path: str) -> None:
        """Hold PATH.lock for life; whoever holds it may replace the socket's file."""
        lock = open(f"{path}.lock", "a", encoding="ascii")  # noqa: SIM115 — held until close
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise EndpointInUseError(
                f"ipc://{path} is in use by another controller", endpoint=f"ipc://{path}"
            ) from None
        self._locks.append((lock, path))

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def relay(self, routes: Mapping[bytes, Route], receiver: Receiver, now_ns: int, count_max: int) -> None:
        """Read up to so many messages that are there now: chunks are passed on, the others are handed over, in order.

        This is the only loop over messages, so it is written out: each call in it would be a tenth of a message's cost.

        Args:
            routes: By sender and the first bytes of the message, where chunks go. What has no route is handed over.
            receiver: Who takes the other messages, and hears of readers that turned out to be gone.
            now_ns: When the worker whose chunks these are was heard.
        """
        receive, send, route_of = self._receive, self._send, routes.get
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
                continue
            route = route_of(sender + header[:ROUTE_BYTES])
            if route is None:
                receiver.link_message(sender, header, EMPTY)
                continue
            route.worker.heard_ns = now_ns
            try:
                if self._parked:
                    raise zmq.Again
                send(route.client, MORE)
            except zmq.ZMQError:
                # Rare: the reader's pipe is full, or the reader is gone.
                if not self.send(route.client, header):
                    receiver.link_lost(route.client)
                continue
            send(header, LAST)

    def _receive_rest(self, sender: RoutingId, header: bytes, first: zmq.Frame, receiver: Receiver) -> None:
        """Hand over a message whose first frame is read; one with a wrong number of frames is dropped."""
        kind = header[0] if header else 0
        last, body = first, EMPTY
        if kind in WITH_BODY:
            if not first.more:
                self.figures.malformed += 1
                return
            last = self._receive(LAST, False)
            # A large body is not copied; it goes on as the frame that it is.
            body = last.bytes if len(last) < _COPY_BYTES_MAX else cast(bytes, last)
        elif kind in _HELLOS:
            self._note_peer(sender, first)
        if last.more:
            self._discard_rest()
        else:
            receiver.link_message(sender, header, body)

    def _discard_rest(self) -> None:
        """Frames that do not belong there. libzmq has no limit on their number, so they are dropped one by one."""
        self.figures.malformed += 1
        while self._receive(LAST, False).more:
            pass

    def readable(self) -> bool:
        """Whether more is there. Also re-arms the file descriptor's edge."""
        return bool(self._option(EVENTS) & POLLIN)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, to: RoutingId, header: bytes, body: bytes = EMPTY) -> bool:
        """Send, or park if the peer's pipe is full. False if the peer is gone, or parks more than it may."""
        if self._parked and to in self._parked:
            return self._park(to, header, body)
        send = self._send
        try:
            send(to, MORE)
        except zmq.Again:
            return self._park(to, header, body)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.figures.unroutable += 1
            return False
        # The pipe took the first frame, so it takes the whole message.
        if body:
            send(header, MORE)
            send(body, LAST, type(body) is bytes)
        else:
            send(header, LAST)
        return True

    def _park(self, to: RoutingId, header: bytes, body: bytes) -> bool:
        size = self._parked_bytes.get(to, 0) + len(header) + len(body)
        if size > limits.PARKED_BYTES_MAX:
            self.figures.overflowed += 1
            self.forget(to)
            return False
        self.figures.parked += 1
        self._parked.setdefault(to, deque()).append((header, body))
        self._parked_bytes[to] = size
        return True

    @property
    def congested(self) -> bool:
        """Whether anything is parked: `retry_parked` is due."""
        return bool(self._parked)

    def retry_parked(self) -> list[RoutingId]:
        """Send what was parked, as far as it goes. Returns peers that are gone."""
        gone: list[RoutingId] = []
        for to in list(self._parked):
            waiting = self._parked.pop(to)
            self._parked_bytes.pop(to)
            while waiting:
                header, body = waiting[0]
                if not self.send(to, header, body):
                    gone.append(to)
                    break
                waiting.popleft()
                if to in self._parked:
                    for header, body in waiting:
                        self._park(to, header, body)
                    break
        return gone

    def forget(self, peer: RoutingId) -> None:
        """Drop what is parked and known of a peer."""
        self._parked.pop(peer, None)
        self._parked_bytes.pop(peer, None)
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

    def _note_peer(self, peer: RoutingId, frame: zmq.Frame) -> None:
        with contextlib.suppress(zmq.ZMQError, ValueError):
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
        for kind, descriptor in self._monitor.read():
            if kind == DOWN:
                for peer in self._descriptors.get(descriptor, ()):
                    self._suspects += [(now_ns + int(ms * 1e6), peer) for ms in (0.0, *limits.PROBE_RETRY_MS)]
        if not self._suspects:
            return []
        due = [peer for at_ns, peer in self._suspects if at_ns <= now_ns]
        self._suspects = [(at_ns, peer) for at_ns, peer in self._suspects if at_ns > now_ns]
        gone: dict[RoutingId, None] = {}
        for peer in due:
            self.figures.probes += 1
            if peer in self._descriptor_of and peer not in gone and not self.send(peer, *_PROBE):
                gone[peer] = None
        if gone:
            self._suspects = [entry for entry in self._suspects if entry[1] not in gone]
        return list(gone)

    def next_probe_ns(self) -> int | None:
        """When `lost_connections` is due again, None for not before the next event."""
        return min((at_ns for at_ns, _ in self._suspects), default=None)

    def close(self) -> None:
        """Close the socket and give up the endpoints."""
        self._monitor.close()
        self._socket.close(linger=0)
        self._authenticator.stop()
        self._context.destroy(linger=0)
        for lock, path in self._locks:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            lock.close()
        self._locks.clear()
