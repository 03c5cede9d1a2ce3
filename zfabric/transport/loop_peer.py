"""A peer of the controller's: its frames, passed on as they are where they can be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, Final

from zfabric import limits
from zfabric.ids import RoutingId
from zfabric.transport.loop_mechanisms import SESSION_BOUNDS
from zfabric.transport.loop_waiting import Admission
from zfabric.transport.loop_wire import FULL_BYTES, Wire
from zfabric.transport.monitor import Happened
from zfabric.wire.codec import EMPTY, ROUTE_BYTES
from zfabric.wire.kinds import CHUNKS, CLIENT_HELLO, WITH_BODY, WORKER_HELLO
from zfabric.zmtp.connection import Connection, Message, Ready
from zfabric.zmtp.faults import DeniedError, GreetingError, HandshakeError
from zfabric.zmtp.frames import LONG, MORE, head

if TYPE_CHECKING:
    from zfabric.transport.loop_router import LoopRouter

_CHUNKS: Final = int(CHUNKS)
_HELLOS: Final = frozenset({int(CLIENT_HELLO), int(WORKER_HELLO)})
_NOBODY: Final = RoutingId(b"")
#: A larger body is given to the transport as it is: to join it with others would copy it.
_JOINED_BYTES_MAX: Final = 64 * 1024
_LONG_HEAD: Final = 9


class Peer(Wire):
    """One connection to the controller.

    Args:
        router: Whose peer it is.
        connection: New.
        source: Where it comes from.
        admission: What it has to get through: a handshake, and a HELLO.
        loop: The running loop.
    """

    #: A peer without a session is owed so little that its bound is looked at from the first of it.
    full_bytes: ClassVar[int] = limits.PARKED_STRANGER_BYTES_MAX

    def __init__(
        self,
        router: LoopRouter,
        connection: Connection,
        source: str,
        admission: Admission,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(connection, loop, router.moved, router.spinner)
        #: Its name once the handshake is over.
        self.name = _NOBODY
        #: The key that it has proved.
        self.key = b""
        self._router = router
        self._source = source
        self._admission = admission
        self._in_session = False
        self._out: list[bytes] = []
        self._large = 0
        self._handed_over = False

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def became_ready(self, ready: Ready) -> None:
        self._admission.handshakes.end(self)
        self.key = ready.key
        if self.key:
            self._source = f"key {self.key.hex()}"
        self.name = self._router.admit(self)
        self._wait_for_session()

    def _wait_for_session(self) -> None:
        if not self._router.is_known(self.name):
            self._admission.sessionless.begin(self, self._source)

    def take_many(self, count_max: int) -> int:
        """Pass on chunks that lie whole in what was read, those that follow one another to one reader as one slice; and take the
        message that is behind them.

        This is the loop over most messages, so it is written out: each call in it would be a tenth of a message's cost.
        """
        reader = self.connection.reader
        data, position = reader.data, reader.position
        size = len(data)
        if size - position < ROUTE_BYTES + 2 or not reader.between_messages:
            return 0
        router, name = self._router, self.name
        target: Peer | None = None
        route_key, begin = b"", position
        while size - position > 2:
            flags = data[position]
            if flags == 0:
                start = position + 2
                end = start + data[position + 1]
            elif flags == LONG and size - position > _LONG_HEAD:
                start = position + _LONG_HEAD
                end = start + int.from_bytes(data[position + 1 : start], "big")
            else:
                break
            if end > size:
                break
            if target is not None and data.startswith(route_key, start, end):
                position = end
                continue
            key = data[start : start + ROUTE_BYTES]
            if end - start < ROUTE_BYTES or key[0] != _CHUNKS:
                break
            route = router.routes.get(name + key)
            if route is None:
                break
            if target is not None:
                target.pass_on(data[begin:position])
            route.worker.heard_ns = router.now_ns()
            target = router.peers.get(route.client)
            if target is None:
                router.lose(route.client)
            route_key, begin = key, position
            position = end
        if target is not None:
            # What was read is one reader's from end to end, more often than not.
            target.pass_on(data if begin == 0 and position == size else data[begin:position])
        reader.position = position
        # To pass a chunk on is so much less than to handle a message that a whole read of them is none.
        return super().take_many(1) if position < size else 0

    def message(self, frames: Message) -> None:
        router, header = self._router, frames[0]
        if router.closed:
            return
        router.begin()
        kind = header[0] if header else 0
        if len(frames) != (2 if kind in WITH_BODY else 1):
            router.malformed += 1
            self._handed_over = True
            router.receiver.link_malformed(self.name, header)
            return
        if kind == _CHUNKS:
            # Encrypted, or larger than one read.
            route = router.routes.get(self.name + header[:ROUTE_BYTES])
            if route is not None:
                route.worker.heard_ns = router.now_ns()
                if not router.send(route.client, header):
                    router.lose(route.client)
                return
        self._handed_over = True
        router.receiver.link_message(self.name, header, frames[1] if len(frames) == 2 else EMPTY)
        if kind not in _HELLOS or self._in_session:
            return
        # Whose HELLO was refused is owed no more than before, but it is not silent.
        self._admission.sessionless.again(self)
        if router.is_known(self.name):
            self._admission.sessionless.end(self)
            self._in_session = True
            self.connection.set_bounds(SESSION_BOUNDS)
            self.call_full(FULL_BYTES)

    def tick(self) -> None:
        super().tick()
        if self._in_session and not self.ended and not self._router.is_known(self.name):
            # It may say HELLO again on this connection.
            self._in_session = False
            self._wait_for_session()

    def worked(self) -> None:
        """Chunks that were passed on lead to nothing; all else may."""
        if self._handed_over:
            self._handed_over = False
            self._router.settle()
        else:
            self._router.passed_on()

    def lost(self) -> None:
        router = self._router
        self._admission.handshakes.end(self)
        self._admission.sessionless.end(self)
        if self.error is not None:
            router.protocol_errors += 1
        if not self.name and not router.closed:
            router.handshake_failed(self._what_failed())
        self._out.clear()
        router.gone(self)

    def _what_failed(self) -> Happened:
        error = self.error
        if isinstance(error, DeniedError):
            return Happened.DENIED
        if isinstance(error, GreetingError) and "mechanism" in error.details:
            return Happened.MISMATCH
        # A HELLO that cannot be opened was made for another server.
        return Happened.WRONG_KEY if isinstance(error, HandshakeError) and "HELLO" in str(error) else Happened.BROKEN

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pass_on(self, frames: bytes) -> None:
        """Send frames as they are, when the turn is over."""
        if not self._out:
            self._router.dirty.append(self)
        self._out.append(frames)

    def put(self, header: bytes, body: bytes) -> None:
        """Send a message when the turn is over."""
        out = self._out
        if not out:
            self._router.dirty.append(self)
        connection = self.connection
        if header[0] not in WITH_BODY:
            out.append(connection.encode(header))
            return
        if len(body) <= _JOINED_BYTES_MAX or not self._plain:
            out.append(connection.encode_pair(header, body))
            return
        out += connection.encode(header, MORE), head(len(body))
        self._large = min(self._large + len(body), limits.QUEUE_BYTES_MAX)
        self._out = []
        self.write_large(b"".join(out), body)

    def write(self, data: bytes) -> None:
        """ZMTP's own answers, behind what waits already: with keys the order is the nonces'."""
        if self._out:
            self.flush()
        super().write(data)

    def flush(self) -> None:
        """Write what waits."""
        out = self._out
        if not out:
            return
        self._out = []
        super().write(out[0] if len(out) == 1 else b"".join(out))
        if self.full and self.overflows() and not self.ended:
            self._router.overflowed += 1
            self._router.lose(self.name)

    def overflows(self) -> bool:
        """Whether more waits than may. Bodies come one a request that this peer takes or asked for, so they have room of
        their own until the buffer has been low again."""
        limit = limits.PARKED_BYTES_MAX if self._router.is_known(self.name) else limits.PARKED_STRANGER_BYTES_MAX
        return self.buffered > limit + self._large

    def resume_writing(self) -> None:
        super().resume_writing()
        self._large = 0
