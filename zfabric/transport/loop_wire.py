"""One connection on the event loop: its transport, its ZMTP, its pings. Both sides' connections are made from this."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import ClassVar, Final, cast

from zfabric import limits
from zfabric.transport import paths
from zfabric.transport.loop_bodies import BodyReader
from zfabric.transport.spin import Spinner
from zfabric.zmtp.connection import Connection, Message, Ping, Pong, Ready
from zfabric.zmtp.faults import ZmtpError

#: Time to live that is sent with a ping: none. It would ask to be cut off as soon as this program is busy for so long.
_PING_TTL: Final = 0
#: From here on asyncio calls a transport's buffer full; what that means is decided by whoever sends.
FULL_BYTES: Final = 64 * 1024


class ByteCount:
    """What all connections of a link have moved, ZMTP's own bytes and encryption included.

    Attributes:
        received, sent: Bytes since its start.
    """

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = self.sent = 0


class Wire(asyncio.Protocol):
    """What both sides' connections do: feed ZMTP, answer it, and find a path that has died.

    Args:
        connection: New.
        loop: The running loop.
        moved: What is read and written is counted there.
        spinner: Told of each read, if there is one.
    """

    #: What a buffer holds that is called full, to begin with.
    full_bytes: ClassVar[int] = FULL_BYTES

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        moved: ByteCount,
        spinner: Spinner | None = None,
    ) -> None:
        self.connection = connection
        self._moved = moved
        self._plain = connection.mechanism.plain
        #: Whether the transport's buffer is full.
        self.full = False
        self.ended = False
        #: Why, if the peer broke the protocol or refuses us.
        self.error: ZmtpError | None = None
        self._loop = loop
        self._spinner = spinner
        self._transport: asyncio.Transport | None = None
        self._bodies: BodyReader | None = None
        self._joins = False
        self._unread: deque[bytes] = deque()
        self._working = False
        self._heard = True
        self._silent_ms = 0
        #: The peer's wish to be cut off after so much silence, 0 for none.
        self._ttl_ms = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        """Whether there is, or was, a connection."""
        return self._transport is not None

    # ── for whoever makes one ───────────────────────────────────────────────────────────────────────────────────────

    def became_ready(self, ready: Ready) -> None:
        """The handshake is over."""

    def message(self, frames: Message) -> None:
        """A message came."""

    def take_many(self, count_max: int) -> int:
        """Take messages that lie whole in what was read, without keys. Returns how many of the burst they are."""
        messages = self.connection.reader.take_whole(count_max)
        for frames in messages:
            self.message(frames)
        return len(messages)

    def worked(self) -> None:
        """What was there has been handled."""

    def lost(self) -> None:
        """The connection is gone."""

    # ── asyncio ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast(asyncio.Transport, transport)
        # What a transport inherits of `writelines` joins its parts; before 3.12 asyncio's own has no other.
        self._joins = type(made).writelines is asyncio.WriteTransport.writelines
        if self.ended:
            # It was given up before it began.
            made.abort()
            return
        made.set_write_buffer_limits(high=self.full_bytes)
        with contextlib.suppress(OSError, AttributeError):
            wire = made.get_extra_info("socket")
            if wire.family in (socket.AF_INET, socket.AF_INET6):
                wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._timer = self._loop.call_later(limits.HANDSHAKE_MS / 1_000, self.abort)
        self.write(self.connection.take_output())

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._moved.received += len(data)
        if self._spinner is not None:
            self._spinner.worked()
        if self._working:
            self._unread.append(data)
            return
        self.connection.reader.feed(data)
        self._work()

    def _work(self) -> None:
        """Handle what was read, up to a bound, then let the loop turn."""
        if self.ended:
            return
        self._working = False
        connection = self.connection
        reader = connection.reader
        try:
            left = limits.BURST_MESSAGES_MAX
            while left > 0:
                if connection.ready:
                    taken = self.take_many(left) if self._plain else 0
                    # Nothing is left to be looked at: what most reads come to.
                    if reader.position == len(reader.data) and reader.body is None and not self._unread:
                        break
                    if self.ended:
                        break
                    left -= taken
                    if taken:
                        continue
                left -= 1
                event = connection.next_event()
                if type(event) is list:
                    self.message(event)
                elif event is None:
                    self._answer()
                    if not self._unread:
                        break
                    reader.feed(self._unread.popleft())
                else:
                    self._note(event)
                if self.ended:
                    break
            else:
                self._go_on_later()
        except ZmtpError as error:
            self._fail(error)
        self.worked()
        if reader.missing >= limits.BODY_READ_BYTES and not self._working:
            self._read_body()

    def _read_body(self) -> None:
        """What is missing of a large body is read to where it stays, until it is whole."""
        if self.ended or self._transport is None or self._transport.is_closing():
            return
        if self._bodies is None:
            self._bodies = BodyReader(self)
        self._transport.set_protocol(self._bodies)

    def body_read(self, count: int) -> None:
        """So much of a large body was read to where it stays."""
        self._heard = True
        self._moved.received += count
        if self._spinner is not None:
            self._spinner.worked()
        reader = self.connection.reader
        reader.fill(count)
        if not reader.missing and self._transport is not None and not self.ended:
            # The transport lets go of what it was lent when this returns; until then the body could only be copied.
            self._go_on_later()
            self._transport.set_protocol(self)

    def _go_on_later(self) -> None:
        self._working = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self.ended:
            self._work()
            wire = self._transport
            if not self._working and wire is not None and not wire.is_closing():
                wire.resume_reading()

    def _note(self, event: Message | Ready | Ping | Pong) -> None:
        if isinstance(event, Ping):
            # Tenths of a second, in steps of our pings.
            self._ttl_ms = event.ttl * 100
        self._answer()
        if isinstance(event, Ready):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self.became_ready(event)

    def _answer(self) -> None:
        """Send what ZMTP itself has to say."""
        output = self.connection.take_output()
        if output:
            self.write(output)

    def _fail(self, error: ZmtpError) -> None:
        """The peer broke the protocol: tell it why, if ZMTP has a word for it, and go."""
        self.error = error
        self._answer()
        if not self.ended and self._transport is not None:
            self._transport.close()
            if self._timer is not None:
                self._timer.cancel()
            # A peer that does not read would keep a transport that closes for ever.
            self._timer = self._loop.call_later(limits.PARTING_MS / 1_000, self.abort)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        # Who is gone may have said something before, and be it goodbye.
        while self._working and not self.ended:
            self._work()
        self._end()
        self.lost()

    def _end(self) -> None:
        self.ended = True
        self._unread.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes) -> None:
        """Send bytes that are ZMTP already."""
        if self._transport is not None and not self.ended:
            self._moved.sent += len(data)
            self._transport.write(data)

    def write_large(self, before: bytes, body: bytes) -> None:
        """Send bytes that are ZMTP already, and a body behind them that is not to be copied."""
        if self._transport is None or self.ended:
            return
        self._moved.sent += len(before) + len(body)
        if self._joins:
            self._transport.write(before)
            # A transport that keeps the rest of it would copy a slice of bytes.
            self._transport.write(memoryview(body))
        else:
            self._transport.writelines((before, body))

    def call_full(self, size: int) -> None:
        """From now on a buffer is called full that holds more than this."""
        if self._transport is not None and not self.ended:
            self._transport.set_write_buffer_limits(high=size)

    @property
    def buffered(self) -> int:
        """Bytes that the kernel has not taken."""
        return self._transport.get_write_buffer_size() if self._transport is not None and not self.ended else 0

    def tick(self) -> None:
        """Every `ZMTP_PING_MS`: give up a path that is silent for too long, and ask again.

        Silence is counted in ticks, not by the clock: a process that stood still has not listened, so it must not take its
        own absence for the peer's. Nor is a silent peer a dead one while its kernel answers; see `_given_up`.
        """
        if self.ended or not self.connection.ready:
            return
        if self._heard:
            self._heard = False
            self._silent_ms = 0
        else:
            self._silent_ms += limits.ZMTP_PING_MS
            if self._given_up():
                self.abort()
                return
        ping = self.connection.ping(_PING_TTL)
        if ping:
            self.write(ping)

    def _given_up(self) -> bool:
        silent_ms = self._silent_ms
        if silent_ms >= limits.SILENCE_MS or 0 < self._ttl_ms <= silent_ms:
            return True
        if silent_ms < limits.ZMTP_TIMEOUT_MS or self._transport is None:
            return False
        return paths.is_dead(self._transport.get_extra_info("socket"), limits.ZMTP_TIMEOUT_MS) is not False

    def abort(self) -> None:
        """Close at once; what is buffered is lost. `lost` is called in the loop's next turn."""
        self.ended = True
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close when the kernel has taken what is buffered, or soon without."""
        if self._transport is not None and not self.ended:
            self._transport.close()
            if self._timer is None:
                self._timer = self._loop.call_later(limits.PARTING_MS / 1_000, self.abort)
