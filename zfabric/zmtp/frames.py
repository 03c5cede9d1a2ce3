"""Frames: the reader that cuts them out of a stream of bytes, and the heads that announce them.

The rules, with the sections of RFC 37 (ZMTP 3.1) that they are from:

F1  A frame is a flags octet, a size of one octet or eight in network order, and a body of that size.        [Framing]
F2  Bits 7 to 3 of the flags are zero.                                                                       [Framing]
F3  MORE is zero on a command.                                                                               [Framing]
F4  A long frame may be as small as a short one.                                                             [Framing]
F5  A message is all of its frames up to the first without MORE. Commands may stand between messages; libzmq also puts
    a PING between the frames of one, so they may stand there too.                                   [Formal Grammar]
F6  Sizes and numbers that are announced are checked before a body is kept: a command's size, a frame's size, and the
    frames and bytes of a message.                                                 [not in the RFC, which has no limits]

Cost: a body that arrives in pieces is read into the object that is handed out, or copied there once (bodies.py). A small
frame that is cut by the end of a read is put before the next read.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from zfabric.zmtp.bodies import Body
from zfabric.zmtp.faults import FramingError, OversizeError

MORE: Final = 1
LONG: Final = 2
COMMAND: Final = 4
_LONG_MORE: Final = LONG | MORE
_RESERVED: Final = 0xF8
#: A frame up to this size that is not whole yet waits in its raw form, and is read again from its start.
_SMALL: Final = 4_096
_LONG_HEAD: Final = 9

_long_head: Final = Struct(">BQ").pack
#: Heads of short frames, by size.
LAST_HEADS: Final = tuple(bytes((0, size)) for size in range(256))
MORE_HEADS: Final = tuple(bytes((MORE, size)) for size in range(256))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a peer may announce.

    Attributes:
        frame_bytes: Of one frame's body.
        message_frames: Frames of one message.
        message_bytes: Bodies of one message's frames together; no less than one may have.
        command_bytes: Of one command.
        ahead_bytes: Room that is made for a body of which less has come (rule B2 of bodies.py).
    """

    frame_bytes: int
    message_frames: int
    message_bytes: int
    command_bytes: int
    ahead_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        assert self.message_bytes >= self.frame_bytes


class Frame(NamedTuple):
    """One frame: its flags (MORE, COMMAND) and its body."""

    flags: int
    body: bytes


def head(size: int, flags: int = 0) -> bytes:
    """What stands before a body of `size` bytes."""
    if size < 256:
        return bytes((flags, size))
    return _long_head(flags | LONG, size)


def command(name: bytes, data: bytes = b"") -> bytes:
    """A whole command frame."""
    body = bytes((len(name),)) + name + data
    return head(len(body), COMMAND) + body


class FrameReader:
    """Cuts frames out of what is read.

    `data` and `position` are open to a relay that passes frames on as they are: it may look at `data` from `position`
    on while `between_messages` holds, and move `position` over whole frames. All else is `next`'s.

    Args:
        bounds: What is announced beyond them is an error. May be replaced between two frames.
    """

    __slots__ = ("_bytes", "_flags", "_frames", "body", "bounds", "data", "missing", "position")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.data = b""
        self.position = 0
        #: Of a large body that has begun, octets that have not come; they may be read into `space` instead of being fed.
        self.missing = 0
        #: The large body that has begun, whole or not.
        self.body: Body | None = None
        self._flags = 0
        self._frames = 0
        self._bytes = 0

    @property
    def between_messages(self) -> bool:
        """Whether the next byte in `data` is the first of a message or a command."""
        return not self._frames and self.body is None

    def take_whole(self, count_max: int) -> list[list[bytes]]:
        """Messages of one or two frames that lie whole in what was read, up to the first that is anything else.

        It is `next` for the most usual case, written out: a message costs one look at each of its heads. What it leaves
        alone, be it cut, larger than the bounds allow or wrong, is `next`'s.
        """
        found: list[list[bytes]] = []
        if self._frames or self.body is not None:
            return found
        data, at, longest = self.data, self.position, self.bounds.frame_bytes
        read = len(data)
        while read - at >= 2 and len(found) < count_max:
            flags = data[at]
            if flags <= MORE:
                start = at + 2
                end = start + data[at + 1]
            elif flags <= _LONG_MORE and read - at >= _LONG_HEAD:
                start = at + _LONG_HEAD
                end = start + int.from_bytes(data[at + 1 : start], "big")
            else:
                break
            if end > read or end - start > longest:
                break
            if flags & MORE:
                second = self._take_second(end, end - start)
                if second is None:
                    break
                begin, last = second
                found.append([data[start:end], data[begin:last]])
                at = last
            else:
                found.append([data[start:end]])
                at = end
        self.position = at
        return found

    def _take_second(self, at: int, size: int) -> tuple[int, int] | None:
        """Where the second frame of a message begins and ends whose first has so many octets; None if it is not the last."""
        data, bounds = self.data, self.bounds
        left = len(data) - at
        if left < 2 or bounds.message_frames < 2:
            return None
        if not data[at]:
            start = at + 2
            end = start + data[at + 1]
        elif data[at] == LONG and left >= _LONG_HEAD:
            start = at + _LONG_HEAD
            end = start + int.from_bytes(data[at + 1 : start], "big")
        else:
            return None
        fits = end - start <= bounds.frame_bytes and size + end - start <= bounds.message_bytes
        return (start, end) if fits and end <= len(data) else None

    def space(self) -> memoryview:
        """While octets are `missing`: where to read them."""
        assert self.body is not None
        return self.body.space()

    def fill(self, count: int) -> None:
        """So many octets were read into `space`."""
        assert self.body is not None
        self.body.fill(count)
        self.missing -= count

    def feed(self, data: bytes) -> None:
        """Take what was read. `next` must have returned None before."""
        if self.missing:
            taken = min(self.missing, len(data))
            assert self.body is not None
            self.body.write(data if taken == len(data) else memoryview(data)[:taken])
            self.missing -= taken
            self.data, self.position = data, taken
        elif self.position < len(self.data):
            self.data, self.position = self.data[self.position :] + data, 0
        else:
            self.data, self.position = data, 0

    def next(self) -> Frame | None:
        """The next frame that is whole, None if there is none yet.

        Raises:
            FramingError: By F2 or F3.
            OversizeError: By F6.
        """
        if self.body is not None:
            return self._finish_body()
        data, position = self.data, self.position
        left = len(data) - position
        if left < 2:
            # F2 needs one octet only, and a peer that sends no more is not worth waiting for.
            if left:
                self._check_flags(data[position])
            return None
        flags = data[position]
        if flags & LONG:  # F1
            if left < _LONG_HEAD:
                self._check_flags(flags)
                return None
            start = position + _LONG_HEAD
            size = int.from_bytes(data[position + 1 : start], "big")
        else:
            start = position + 2
            size = data[position + 1]
        self._check_flags(flags)
        if flags & COMMAND or self._frames or size > self.bounds.frame_bytes or size > self.bounds.message_bytes:
            self._check_size(flags, size)
        end = start + size
        if end > len(data):
            if size > _SMALL:
                self._begin_body(flags, start, size)
            return None
        self.position = end
        if flags & MORE or self._frames:
            self._count(flags, size)
        return Frame(flags & ~LONG, data[start:end])

    def _begin_body(self, flags: int, start: int, size: int) -> None:
        """A large frame has begun: from here on each piece goes to where it stays."""
        self.body = Body(size, self.bounds.ahead_bytes)
        if start < len(self.data):
            self.body.write(memoryview(self.data)[start:])
        self.missing = self.body.missing
        self._flags = flags
        self.data, self.position = b"", 0

    def _finish_body(self) -> Frame | None:
        if self.missing:
            return None
        assert self.body is not None
        body = self.body.take()
        self.body = None
        self._count(self._flags, len(body))
        return Frame(self._flags & ~LONG, body)

    @staticmethod
    def _check_flags(flags: int) -> None:
        if flags & _RESERVED:  # F2
            raise FramingError(f"frame has flags 0x{flags:02x}, bits 7 to 3 must be zero", flags=flags)
        if flags & COMMAND and flags & MORE:  # F3
            raise FramingError("a command has the MORE flag", flags=flags)

    def _check_size(self, flags: int, size: int) -> None:
        """F6."""
        bounds = self.bounds
        if flags & COMMAND:
            if size > bounds.command_bytes:
                raise OversizeError(
                    f"command of {size} bytes, limit is {bounds.command_bytes}", bytes=size, limit=bounds.command_bytes
                )
            return
        if size > bounds.frame_bytes:
            raise OversizeError(
                f"frame of {size} bytes, limit is {bounds.frame_bytes}", bytes=size, limit=bounds.frame_bytes
            )
        if self._frames >= bounds.message_frames:
            raise OversizeError(f"message of more than {bounds.message_frames} frames", limit=bounds.message_frames)
        if self._bytes + size > bounds.message_bytes:
            raise OversizeError(
                f"message of {self._bytes + size} bytes or more, limit is {bounds.message_bytes}",
                limit=bounds.message_bytes,
            )

    def _count(self, flags: int, size: int) -> None:
        """F5: how far the message is."""
        if flags & COMMAND:
            return
        if flags & MORE:
            self._frames += 1
            self._bytes += size
        else:
            self._frames = self._bytes = 0
