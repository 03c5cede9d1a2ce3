"""A large body on its way: read straight into the object that is handed out.

B1  Room is made when the first octets of a body are there to be read, never for an announcement alone, and only after its size
    was found to be within the bounds (rule F6 of frames.py).
B2  There is room for no more than `ahead` octets, or for four times what has come: whoever announces much and sends little
    holds little.
B3  What has come moves when room is made anew. Room is the whole, or a quarter of it, or a quarter of that …, so all moves of a
    body together copy a third of it at most, however small the pieces are that it comes in.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

_GROWTH: Final = 4


class Body:
    """Where the octets of one body go.

    Args:
        size: As announced.
        ahead: B2; at least one.

    Example:
        >>> body = Body(5, ahead=2)
        >>> body.write(b"wor")
        >>> body.space()[:2] = b"ld"
        >>> body.fill(2)
        >>> body.missing, body.take()
        (0, b'world')
    """

    __slots__ = ("_ahead", "_filled", "_into", "_room", "_view", "missing")

    def __init__(self, size: int, ahead: int) -> None:
        #: Octets that have not come yet.
        self.missing = size
        self._ahead = ahead
        self._filled = 0
        self._room = 0
        self._into: BytesIO | None = None
        self._view = memoryview(b"")

    def space(self) -> memoryview:
        """Where to read what comes next: at least one octet, at most what is missing."""
        if self._filled == self._room:
            self._grow(0)
        return self._view[self._filled :]

    def fill(self, count: int) -> None:
        """So many octets were read into `space`."""
        self._filled += count
        self.missing -= count

    def write(self, piece: bytes | memoryview) -> None:
        """Take octets that were read elsewhere, no more than are missing."""
        count = len(piece)
        if not count:
            return
        if self._room - self._filled < count:
            self._grow(count)
        self._view[self._filled : self._filled + count] = piece
        self.fill(count)

    def take(self) -> bytes:
        """The body, once nothing is missing. Without a copy if nobody holds what `space` returned any more."""
        self._view = memoryview(b"")
        return self._into.getvalue() if self._into is not None else b""

    def _grow(self, count: int) -> None:
        """Make room when so many more have come."""
        filled = self._filled
        room, most = filled + self.missing, max(self._ahead, _GROWTH * (filled + count))
        while room > most:
            room = -(-room // _GROWTH)
        self._room = room
        # CPython lends out the octets of a BytesIO that has as many as it was made with, and then gives them away without a copy;
        # those of bytes(count) are not touched before they are written.
        into = BytesIO(bytes(self._room))
        view = into.getbuffer()
        if filled:
            view[:filled] = self._view[:filled]
        self._into, self._view = into, view
