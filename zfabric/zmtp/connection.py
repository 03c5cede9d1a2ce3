"""One ZMTP connection: greeting, handshake, traffic. Pure: no socket, no loop, no clock.

The rules, with the sections of RFC 37 (ZMTP 3.1) that they are from; frames, metadata and mechanisms have theirs in their
own files.

G1  Each side sends 64 octets at once: signature, version 3.1, mechanism, as-server, filler.     [Version Negotiation]
G2  The signature is 0xff, eight octets that mean nothing, 0x7f.                                      [Formal Grammar]
G3  A major version below 3 is not spoken here; any above is treated as 3.1.                     [Version Negotiation]
G4  Both sides must name the same mechanism.                                      [Authentication and Confidentiality]
G5  as-server is sent as the mechanism has it, and not checked: libzmq always sends zero.             [Formal Grammar]
H1  After the greeting only commands may come, until the mechanism is ready.                          [Overall Behavior]
H2  A command is a name with its size in one octet, then data.                                        [Formal Grammar]
T1  A PING is answered by a PONG with its context, of which 16 octets at most count.          [Connection Heartbeating]
T2  A PING has two octets of time to live, in tenths of a second; zero is none.               [Connection Heartbeating]
T3  PING is not sent to a peer of version 3.0.                                                [Connection Heartbeating]
T4  Commands that are not known are ignored: a SUBSCRIBE is nothing to a ROUTER or DEALER.                  [Commands]
T5  With CURVE every frame is a MESSAGE, whose inner flags count. libzmq sets no COMMAND flag on it.         [RFC 26]
T6  A message is handed out whole or not at all.                                                            [Messages]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Protocol

from zfabric.zmtp.faults import FramingError, GreetingError, HandshakeError, OversizeError, ZmtpError
from zfabric.zmtp.frames import COMMAND, LAST_HEADS, MORE, MORE_HEADS, Bounds, FrameReader, command, head

GREETING_BYTES: Final = 64
#: G2. The eight octets mean nothing; these are the ones that libzmq sends.
_SIGNATURE: Final = b"\xff" + bytes(7) + b"\x01\x7f"
_VERSION: Final = b"\x03\x01"
_MECHANISM_BYTES: Final = 20
_CONTEXT_BYTES_MAX: Final = 16


class Mechanism(Protocol):
    """A security mechanism, for one connection."""

    @property
    def name(self) -> bytes: ...
    @property
    def as_server(self) -> bool: ...
    @property
    def plain(self) -> bool: ...
    @property
    def overhead(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def peer_key(self) -> bytes: ...
    def start(self) -> bytes: ...
    def receive(self, name: bytes, data: bytes) -> bytes: ...
    def seal(self, flags: int, body: bytes) -> bytes: ...
    def open(self, body: bytes) -> tuple[int, bytes]: ...


@dataclass(frozen=True, slots=True)
class Ready:
    """The handshake is over: messages may be sent.

    Attributes:
        minor: The peer's minor version; 0 knows no PING.
        key: The peer's proved public key, 32 octets; empty without CURVE.
    """

    minor: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Ping:
    """The peer is alive, and wants an answer, which is in `take_output`.

    Attributes:
        ttl: Tenths of a second without traffic after which it wants the connection closed, 0 for never.
    """

    ttl: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The peer is alive."""


#: The frames of one message.
Message = list[bytes]
Event = Message | Ready | Ping | Pong


class Connection:
    """One side of one connection.

    `feed` it what is read, then call `next_event` until None; send what `take_output` returns after each. The first
    error is final: it is raised again by every later call.

    Args:
        mechanism: New, for this connection alone.
        bounds: What the peer may announce.
    """

    __slots__ = (
        "_error",
        "_frames",
        "_minor",
        "_output",
        "_plain",
        "bounds",
        "greeted",
        "mechanism",
        "reader",
        "ready",
    )

    def __init__(self, mechanism: Mechanism, bounds: Bounds) -> None:
        self.mechanism = mechanism
        self.bounds = bounds
        #: Whether messages may be sent and received.
        self.ready = False
        # Commands of a handshake are small, and nothing else may come.
        self.reader = FrameReader(replace(bounds, frame_bytes=0))
        #: Whether the peer has said that it speaks ZMTP, with the same mechanism.
        self.greeted = False
        self._plain = mechanism.plain
        self._minor = 1
        self._frames: list[bytes] = []
        self._error: ZmtpError | None = None
        # G1, G5
        name = mechanism.name.ljust(_MECHANISM_BYTES, b"\0")
        self._output = [(_SIGNATURE + _VERSION + name + bytes((mechanism.as_server,))).ljust(GREETING_BYTES, b"\0")]

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, data: bytes) -> None:
        """Take what was read. `next_event` must have returned None before."""
        self.reader.feed(data)

    def next_event(self) -> Event | None:
        """The next thing that happened, None when more bytes are needed.

        Raises:
            ZmtpError: The peer breaks the protocol, or refuses us. Close after sending what is still to be sent.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._next_message() if self.ready else self._next_step()
        except ZmtpError as error:
            self._error = error
            if error.reply:
                self._output.append(error.reply)
            raise

    def _next_step(self) -> Event | None:
        """Greeting and handshake."""
        if not self.greeted and not self._read_greeting():
            return None
        while (frame := self.reader.next()) is not None:
            if not frame.flags & COMMAND:
                raise FramingError("a message comes before the handshake is over")  # H1
            reply = self.mechanism.receive(*_split(frame.body))
            if reply:
                self._output.append(reply)
            if self.mechanism.ready:
                self.ready = True
                self._set_bounds()
                return Ready(self._minor, self.mechanism.peer_key)
        return None

    def _read_greeting(self) -> bool:
        reader = self.reader
        data = reader.data
        # What is wrong already is not waited for to be complete.
        if data[:1] not in (b"", b"\xff") or (len(data) > 9 and data[9] != 0x7F):  # G2
            raise GreetingError("the peer does not speak ZMTP", first=data[:10].hex())
        if len(data) > 10 and data[10] < 3:  # G3
            raise GreetingError(f"the peer speaks ZMTP {data[10]}, 3 is needed", version=data[10])
        if len(data) < GREETING_BYTES:
            return False
        theirs = data[12 : 12 + _MECHANISM_BYTES]
        if theirs != self.mechanism.name.ljust(_MECHANISM_BYTES, b"\0"):  # G4
            text = theirs.rstrip(b"\0").decode("ascii", "replace")
            raise GreetingError(
                f"the peer has mechanism {text!r}, {self.mechanism.name.decode()} is needed", mechanism=text
            )
        self._minor = data[11] if data[10] == 3 else 1  # G3
        self.greeted = True
        reader.position = GREETING_BYTES
        self._output.append(self.mechanism.start())
        return True

    def set_bounds(self, bounds: Bounds) -> None:
        """From now on a peer may announce this much. Call between two events."""
        self.bounds = bounds
        if self.ready:
            self._set_bounds()

    def _set_bounds(self) -> None:
        more = self.mechanism.overhead
        bounds = self.bounds
        if more:
            # T5: a frame of the wire is one inner frame, command or not; a message's frames are counted inside.
            size = bounds.frame_bytes + more
            bounds = replace(bounds, frame_bytes=size, message_bytes=size, command_bytes=size)
        self.reader.bounds = bounds

    def _next_message(self) -> Event | None:
        while (frame := self.reader.next() if self._plain else self._next_opened()) is not None:
            flags, body = frame
            if flags & COMMAND:
                event = self._command(body)
                if event is not None:
                    return event
                continue
            if not flags:
                if not self._frames:
                    return [body]
                frames, self._frames = self._frames, []  # T6
                frames.append(body)
                return frames
            self._frames.append(body)
        return None

    def _next_opened(self) -> tuple[int, bytes] | None:
        """T5, and F6 for what is inside."""
        whole = self.reader.take_whole(1)
        frame = (MORE if len(whole[0]) > 1 else 0, whole[0][0]) if whole else self.reader.next()
        if frame is None:
            return None
        if frame[0] & MORE:
            raise FramingError("a MESSAGE has the MORE flag")
        inner, body = self.mechanism.open(frame[1])
        if self._frames and not inner & COMMAND:
            self._check_message(body)
        return inner, body

    def _check_message(self, body: bytes) -> None:
        """F6, for a frame that is not the first of its message."""
        bounds, frames = self.bounds, self._frames
        if len(frames) >= bounds.message_frames:
            raise OversizeError(f"message of more than {bounds.message_frames} frames", limit=bounds.message_frames)
        if sum(map(len, frames)) + len(body) > bounds.message_bytes:
            raise OversizeError(f"message of more than {bounds.message_bytes} bytes", limit=bounds.message_bytes)

    def _command(self, body: bytes) -> Event | None:
        name, data = _split(body)
        if name == b"PING":
            if len(data) < 2:  # T2
                raise FramingError("a PING has no time to live")
            self._output.append(self.encode_command(b"PONG", data[2 : 2 + _CONTEXT_BYTES_MAX]))  # T1
            return Ping(int.from_bytes(data[:2], "big"))
        return Pong() if name == b"PONG" else None  # T4

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def take_output(self) -> bytes:
        """What has to be sent now; empty if nothing."""
        if not self._output:
            return b""
        output, self._output = self._output, []
        return output[0] if len(output) == 1 else b"".join(output)

    def ping(self, ttl: int) -> bytes:
        """A PING with its time to live in tenths of a second; nothing for a peer that knows none (T3)."""
        if not self.ready or self._minor == 0:
            return b""
        return self.encode_command(b"PING", min(ttl, 0xFFFF).to_bytes(2, "big"))

    def encode_command(self, name: bytes, data: bytes) -> bytes:
        """A command as the peer expects it after the handshake."""
        if self._plain:
            return command(name, data)
        box = self.mechanism.seal(COMMAND, bytes((len(name),)) + name + data)
        return head(len(box)) + box

    def encode(self, body: bytes, more: int = 0) -> bytes:
        """One frame of a message, ready to be sent; `more` is MORE if others follow."""
        if not self._plain:
            body = self.mechanism.seal(more, body)
            more = 0
        size = len(body)
        if size < 256:
            return (MORE_HEADS if more else LAST_HEADS)[size] + body
        return head(size, more) + body

    def encode_pair(self, first: bytes, second: bytes) -> bytes:
        """A message of two frames, ready to be sent."""
        one, two = len(first), len(second)
        if self._plain and one < 256 and two < 256:
            return b"".join((MORE_HEADS[one], first, LAST_HEADS[two], second))
        return self.encode(first, MORE) + self.encode(second)


def _split(body: bytes) -> tuple[bytes, bytes]:
    """H2: a command's name and data."""
    if not body or not body[0] or body[0] > len(body) - 1:
        raise HandshakeError("a command has no name")
    return body[1 : 1 + body[0]], body[1 + body[0] :]
