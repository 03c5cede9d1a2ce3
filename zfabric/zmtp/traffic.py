"""Boxes of a connection's traffic: one call of libsodium a frame, its nonce's prefix and its memory made once.

PyNaCl's public functions check and wrap every argument, allocate memory through cffi and copy what comes out of it: two thirds
of what a small box costs. So frames, of which there are many, call libsodium through the same binding that those functions
call it through; handshakes keep to the functions (boxes.py). `tests/unit/test_zmtp_traffic.py` holds one against the other.
"""

from __future__ import annotations

from typing import Any, Final

from nacl import _sodium

from zfabric.zmtp.boxes import MAC_BYTES
from zfabric.zmtp.faults import HandshakeError

#: cffi's own types say nothing to a checker.
_ffi: Final[Any] = _sodium.ffi
_seal: Final[Any] = _sodium.lib.crypto_box_easy_afternm
_open: Final[Any] = _sodium.lib.crypto_box_open_easy_afternm

_PREFIX_BYTES: Final = 16
_NUMBER_BYTES: Final = 8
#: Texts up to this size use the memory that a connection keeps.
_KEPT_BYTES: Final = 1_024


class _Direction:
    """What the boxes of one direction share.

    Args:
        shared: The key that both sides have computed.
        prefix: The first 16 octets of each nonce; the other eight are a number.
    """

    __slots__ = ("_key", "_nonce", "_nonce_at")

    def __init__(self, shared: bytes, prefix: bytes) -> None:
        assert len(prefix) == _PREFIX_BYTES
        self._key = shared
        self._nonce = bytearray(prefix + bytes(_NUMBER_BYTES))
        self._nonce_at = _ffi.from_buffer(self._nonce)


class Sealer(_Direction):
    """Makes messages: `before`, the nonce's number, a box.

    Args:
        shared, prefix: The direction's.
        before: What each message begins with.
    """

    __slots__ = ("_begin", "_box_at", "_number_end", "_overhead", "_room", "_view")

    def __init__(self, shared: bytes, prefix: bytes, before: bytes) -> None:
        super().__init__(shared, prefix)
        self._begin = len(before)
        self._number_end = len(before) + _NUMBER_BYTES
        self._overhead = self._number_end + MAC_BYTES
        self._room = bytearray(before + bytes(_NUMBER_BYTES + MAC_BYTES + _KEPT_BYTES))
        self._view = memoryview(self._room)
        self._box_at = _ffi.from_buffer(self._room) + self._number_end

    def seal(self, number: bytes, text: bytes) -> bytes:
        """The message of a text; `number` is eight octets that were never used before."""
        size = len(text)
        self._nonce[_PREFIX_BYTES:] = number
        if size <= _KEPT_BYTES:
            self._room[self._begin : self._number_end] = number
            _seal(self._box_at, text, size, self._nonce_at, self._key)
            return bytes(self._view[: self._overhead + size])
        made = bytearray(self._overhead + size)
        made[: self._number_end] = self._view[: self._begin].tobytes() + number
        _seal(_ffi.from_buffer(made) + self._number_end, text, size, self._nonce_at, self._key)
        return bytes(made)


class Opener(_Direction):
    """Opens what the other side's `Sealer` has made.

    Args:
        shared, prefix: The direction's.
    """

    __slots__ = ("_room", "_room_at")

    def __init__(self, shared: bytes, prefix: bytes) -> None:
        super().__init__(shared, prefix)
        self._room = bytearray(_KEPT_BYTES)
        self._room_at = _ffi.from_buffer(self._room)

    def open(self, number: bytes, message: bytes, start: int) -> tuple[int, bytes]:
        """The first octet of the text, and the rest of it.

        Args:
            number: The nonce's.
            message: What the box is in, up to its end.
            start: Where the box begins; at least one octet of text is in it.

        Raises:
            HandshakeError: The box was not made with this key and number.
        """
        size = len(message) - start - MAC_BYTES
        self._nonce[_PREFIX_BYTES:] = number
        if size <= _KEPT_BYTES:
            room = self._room
            # A copy of so little is cheaper than a pointer to its place.
            failed = _open(self._room_at, message[start:], size + MAC_BYTES, self._nonce_at, self._key)
        else:
            room = bytearray(size)
            box_at = _ffi.from_buffer(message) + start
            failed = _open(_ffi.from_buffer(room), box_at, size + MAC_BYTES, self._nonce_at, self._key)
        if failed:
            raise HandshakeError("the box of MESSAGE cannot be opened")
        return room[0], bytes(memoryview(room)[1:size])
