"""A client's or worker's link on the event loop's own transports: one connection, made anew whenever it is lost."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterable
from pathlib import Path

from zfabric import limits
from zfabric.errors import ConfigurationError, FabricError
from zfabric.transport.curve import Credentials
from zfabric.transport.endpoints import Endpoint, parse_endpoints
from zfabric.transport.greeting import exchange_mechanisms
from zfabric.transport.ipc import check_ipc_owner, check_listener
from zfabric.transport.links import DealerReceiver
from zfabric.transport.loop_mechanisms import DealerConnections
from zfabric.transport.loop_wire import ByteCount, Wire
from zfabric.transport.refusals import NO_KEYS_HERE, NO_KEYS_THERE, OTHER_KEY, UNKNOWN_KEY, Refusal, refused
from zfabric.transport.spin import Spinner
from zfabric.transport.targets import Targets, unknown
from zfabric.wire.codec import EMPTY
from zfabric.wire.kinds import WITH_BODY
from zfabric.zmtp.connection import Connection, Message, Ready
from zfabric.zmtp.faults import DeniedError, GreetingError
from zfabric.zmtp.frames import MORE, head

#: A larger body is given to the transport as it is: to join it with others would copy it.
_JOINED_BYTES_MAX = 64 * 1024


class _Peer(Wire):
    """The connection to the controller."""

    def __init__(
        self, link: LoopDealer, connection: Connection, where: Endpoint, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(connection, loop, link.moved, link.spinner)
        self._link = link
        self.over = loop.create_future()
        #: The address that it is a connection to.
        self.where = where

    def became_ready(self, ready: Ready) -> None:
        self._link.now_up(self)

    def take_many(self, count_max: int) -> int:
        # Most of what a client reads comes this way, so it has one call less than `message` would make.
        messages, take = self.connection.reader.take_whole(count_max), self._link.take
        for frames in messages:
            take(frames)
        return len(messages)

    def message(self, frames: Message) -> None:
        self._link.take(frames)

    def worked(self) -> None:
        self._link.now_idle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._link.now_idle()

    def lost(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
        self._link.now_down(self)


class LoopDealer:
    """One connection, for ever; see `links.DealerDriver`.

    Args:
        endpoint: The controller's; its name is resolved, and its file read, anew for each try. Of several, or a name with several
            addresses, each is tried in turn.
        receiver: Told what comes.
        rng: Chance, for the jitter of reconnects.
        credentials: Keys for a controller that wants them.
        spin_us: Look for answers for so long after each read and send before the loop sleeps; 0 is not at all.

    Raises:
        ConfigurationError: The endpoint or a key is none, or an ipc socket's directory is somebody else's.
    """

    def __init__(
        self,
        endpoint: str,
        receiver: DealerReceiver,
        rng: random.Random,
        credentials: Credentials | None = None,
        *,
        spin_us: int = 0,
    ) -> None:
        self.endpoint = endpoint
        #: Why the last try to connect failed, in words; "" if it did not.
        self.trouble = ""
        parsed = parse_endpoints(endpoint)
        for one in parsed:
            if one.is_ipc:
                # Each try looks again; whoever opens the link is to hear it from the call.
                check_ipc_owner(Path(one.path))
        self._targets = Targets(parsed, rng)
        self._receiver = receiver
        # Each process draws a first delay and a cap of its own.
        self._first_s = limits.RECONNECT_MIN_MS * rng.uniform(0.5, 1.5) / 1_000
        self._cap_s = limits.RECONNECT_MAX_MS * rng.uniform(0.5, 1.0) / 1_000
        self._has_keys = credentials is not None
        self._broken = 0
        self._connections = DealerConnections(credentials)
        self._loop = asyncio.get_running_loop()
        self.spinner = Spinner(self._loop, spin_us) if spin_us else None
        self.moved = ByteCount()
        #: The connection once its handshake is over, and the one that is tried or used.
        self._peer: _Peer | None = None
        self._current: _Peer | None = None
        self._closed = False
        self._malformed = self._connected_count = self._protocol_errors = 0
        self._ticker = self._loop.call_later(limits.ZMTP_PING_MS / 1_000, self._tick)
        self._task = self._loop.create_task(self._run())

    @property
    def connected(self) -> bool:
        """Whether the controller is there, as far as is known."""
        return self._peer is not None

    @property
    def congested(self) -> bool:
        """Whether the controller reads more slowly than is sent."""
        return self._peer is not None and self._peer.full

    @property
    def several(self) -> bool:
        """Whether there is more than one controller to go to, as far as is known."""
        return self._targets.several

    def move_on(self) -> None:
        """Leave this controller for the next one."""
        if self._current is not None and not self._closed:
            self._current.abort()

    def counted(self) -> dict[str, int]:
        """What the link counted."""
        return {
            "malformed": self._malformed,
            "connections": self._connected_count,
            "protocol_errors": self._protocol_errors,
            "received_bytes": self.moved.received,
            "sent_bytes": self.moved.sent,
            "rescued": 0,
        }

    # ── connecting ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        """Connect, wait for the end, wait a little, again."""
        delay_s, hurried = self._first_s, True
        while True:
            before = self._connected_count
            peer = await self._reach(hurried=hurried)
            since_s = self._loop.time()
            if peer is not None:
                if self.several and hurried:
                    self._loop.call_later(limits.MOVE_CONNECT_MS / 1_000, self._give_up, peer)
                try:
                    await peer.over
                finally:
                    if not self._closed:
                        peer.abort()
            hurried = self._connected_count > before
            if hurried:
                delay_s = self._first_s
                if self.several and self._loop.time() - since_s > self._cap_s:
                    continue
            elif peer is not None:
                await self._explain(peer)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, self._cap_s)

    def _give_up(self, peer: _Peer) -> None:
        """Somebody accepts connections, and says nothing: others may."""
        if self._current is peer and self._peer is not peer and not self._closed:
            peer.abort()

    async def _reach(self, *, hurried: bool) -> _Peer | None:
        """A connection to the first address where somebody listens. None if there is none; `trouble` says why."""
        try:
            targets = await self._targets.round()
        except ConfigurationError as error:
            self._deny(error.message, error)
            return None
        except OSError as error:
            self.trouble = unknown(error)
            return None
        self.trouble = "the name has no address"
        limit_s = (limits.MOVE_CONNECT_MS if hurried and self.several else limits.HANDSHAKE_MS) / 1_000
        for target in targets:
            self._targets.trying(target)
            try:
                if target.is_ipc and not check_ipc_owner(Path(target.path)):
                    self.trouble = "there is no such socket"
                    continue
                peer = await self._connect(target, limit_s)
            except ConfigurationError as error:
                self._deny(error.message, error)
                continue
            if peer is not None:
                return peer
        return None

    async def _connect(self, where: Endpoint, limit_s: float) -> _Peer | None:
        peer = self._current = _Peer(self, self._connections.make(), where, self._loop)
        try:
            async with asyncio.timeout(limit_s):
                if where.is_ipc:
                    await self._connect_ipc(peer, where.path)
                else:
                    await self._loop.create_connection(lambda: peer, where.host, where.port)
        except (OSError, TimeoutError) as error:
            self.trouble = "nobody listens there" if isinstance(error, ConnectionError) else str(error) or "no answer"
            self._broken = 0
            return None
        return peer

    async def _connect_ipc(self, peer: _Peer, path: str) -> None:
        """Connect, and look who listens before anything is said. Raises: ConfigurationError."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.setblocking(False)
            await self._loop.sock_connect(connected, path)
            check_listener(connected, path)
            await self._loop.create_unix_connection(lambda: peer, sock=connected)
        except BaseException:
            connected.close()
            raise

    # ── handshakes that failed ──────────────────────────────────────────────────────────────────────────────────────

    async def _explain(self, peer: _Peer) -> None:
        """Somebody was there, and there was no connection."""
        self.trouble = "what listens there is no controller, or ends"
        if isinstance(peer.error, DeniedError):
            self._refuse(UNKNOWN_KEY)
        elif isinstance(peer.error, GreetingError) and "mechanism" in peer.error.details:
            self._refuse(NO_KEYS_THERE if self._has_keys else NO_KEYS_HERE)
        elif not peer.connection.greeted:
            # libzmq ends a mismatch before it has said its mechanism, to who says his own at once.
            mechanism = await exchange_mechanisms(peer.where, "CURVE" if self._has_keys else "NULL")
            self._broken = 0
            if mechanism is not None and (mechanism == "CURVE") != self._has_keys:
                self._refuse(NO_KEYS_THERE if self._has_keys else NO_KEYS_HERE)
        elif self._has_keys:
            # It speaks CURVE as well, and ends handshakes again and again: it cannot read what is encrypted for another.
            self._broken += 1
            if self._broken >= limits.HANDSHAKES_MAX:
                self._refuse(OTHER_KEY)
        self.now_idle()

    def _refuse(self, refusal: Refusal) -> None:
        self._deny(f"the controller {refusal[1]}", refused(refusal, self.endpoint))

    def _deny(self, trouble: str, error: FabricError) -> None:
        self.trouble = trouble
        if not self._closed:
            self._receiver.link_denied(error)

    def now_up(self, peer: _Peer) -> None:
        """The handshake is over."""
        self._peer = peer
        self.trouble = ""
        self._broken = 0
        self._connected_count += 1
        self._receiver.link_up()

    def now_down(self, peer: _Peer) -> None:
        """The connection is gone, or never came to be one."""
        self._protocol_errors += peer.error is not None
        if self._closed:
            return
        if self._peer is peer:
            self._peer = None
            self._receiver.link_down()
        self._receiver.link_idle()

    def _tick(self) -> None:
        if self._peer is not None:
            self._peer.tick()
        self._ticker = self._loop.call_later(limits.ZMTP_PING_MS / 1_000, self._tick)

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, frames: Message) -> None:
        """A message of the controller's."""
        header = frames[0]
        if self._closed:
            return
        has_body = header and header[0] in WITH_BODY
        if len(frames) == 1 and not has_body:
            self._receiver.link_message(header, EMPTY)
        elif len(frames) == 2 and has_body:
            self._receiver.link_message(header, frames[1])
        else:
            self._malformed += 1
            if has_body:
                self._receiver.link_message(header, EMPTY)

    def now_idle(self) -> None:
        """All that was there has been handled."""
        if not self._closed:
            self._receiver.link_idle()

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send in order, in one write but for large bodies. Without a connection they are dropped."""
        peer = self._peer
        if peer is None:
            return
        if self.spinner is not None:
            self.spinner.worked()
        connection, plain = peer.connection, peer.connection.mechanism.plain
        parts: list[bytes] = []
        for header, body in messages:
            if header[0] not in WITH_BODY:
                parts.append(connection.encode(header))
            elif plain and len(body) > _JOINED_BYTES_MAX:
                parts += connection.encode(header, MORE), head(len(body))
                peer.write_large(b"".join(parts), body)
                parts.clear()
            else:
                parts.append(connection.encode_pair(header, body))
        if parts:
            peer.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Close. What the kernel takes within a moment still leaves. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self.spinner is not None:
            self.spinner.close()
        self._ticker.cancel()
        self._peer = None
        if self._current is not None:
            self._current.close()
        self._task.cancel()
