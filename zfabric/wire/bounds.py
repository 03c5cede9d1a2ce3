"""How much a request may hold, looked at before it is decoded.

MessagePack says at the start of each list how many values follow, so a body that would take gigabytes or seconds to
decode is known by its first bytes. The client looks before it sends, the worker before it decodes: neither's event loop
does work that grows with what somebody else wrote.
"""

from __future__ import annotations

from typing import Final

from zfabric.errors import TooLargeError
from zfabric.limits import REQUEST_BYTES_UNSEEN, REQUEST_PARTS_MAX, REQUEST_TEXT_BYTES_MAX, REQUEST_VALUES_MAX

#: Bytes of a value by its first one, for all that have a fixed size and nothing inside; 0 for the others.
_SIZES: Final = bytes(
    {
        0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5,
        0xD3: 9, 0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18,
    }.get(first, 1 if first < 0x80 or first >= 0xE0 else 0)
    for first in range(256)
)  # fmt: skip
_TEXT, _BINARY, _LIST, _MAP = range(4)
#: Of all others: what they are, and in how many bytes they say how long they are.
_HEADS: Final = {
    0xC4: (_BINARY, 1), 0xC5: (_BINARY, 2), 0xC6: (_BINARY, 4), 0xC7: (_BINARY, 1), 0xC8: (_BINARY, 2),
    0xC9: (_BINARY, 4), 0xD9: (_TEXT, 1), 0xDA: (_TEXT, 2), 0xDB: (_TEXT, 4), 0xDC: (_LIST, 2), 0xDD: (_LIST, 4),
    0xDE: (_MAP, 2), 0xDF: (_MAP, 4),
}  # fmt: skip
#: Binaries that have a byte for their type besides.
_EXTENSIONS: Final = frozenset({0xC7, 0xC8, 0xC9})


def check_request(body: bytes) -> None:
    """Look through the encoded body of a request: the second frame of SUBMIT and DISPATCH.

    What is broken off, or of no known kind, is left to the decoder.

    Raises:
        TooLargeError: It holds more values, parts or text than one request may.
    """
    if len(body) <= REQUEST_BYTES_UNSEEN:
        return
    end = len(body)
    position = text = parts = 0
    values = left = 1
    while left and position < end:
        position, left = _skip_plain(body, position, left)
        if not left or position >= end:
            return
        kind, count, position = _head(body, position)
        left -= 1
        parts += 1
        if kind >= _LIST:
            left += count
            values += count
        else:
            position += count
            text += count if kind == _TEXT else 0
        if parts > REQUEST_PARTS_MAX:
            raise _too_large("texts, lists and maps", parts, REQUEST_PARTS_MAX)
        if values > REQUEST_VALUES_MAX:
            raise _too_large("values", values, REQUEST_VALUES_MAX)
        if text > REQUEST_TEXT_BYTES_MAX:
            raise _too_large("bytes of text", text, REQUEST_TEXT_BYTES_MAX)


def _skip_plain(body: bytes, position: int, count: int) -> tuple[int, int]:
    """Go past numbers and the like, which are most of a large request. Returns where it stopped, and how many are left."""
    sizes, end = _SIZES, len(body)
    for skipped in range(count):
        if position >= end:
            return position, 0
        size = sizes[body[position]]
        if not size:
            return position, count - skipped
        position += size
    return position, 0


def _head(body: bytes, position: int) -> tuple[int, int, int]:
    """What begins here, how much is in it, and where that begins. In a map, keys and values count alike."""
    first = body[position]
    if 0xA0 <= first < 0xC0:
        return _TEXT, first & 0x1F, position + 1
    if first < 0x90:
        return _MAP, 2 * (first & 0x0F), position + 1
    if first < 0xA0:
        return _LIST, first & 0x0F, position + 1
    # 0xC1 is not in use: the decoder will say so.
    kind, width = _HEADS.get(first, (_BINARY, 0))
    content = position + 1 + width
    count = int.from_bytes(body[position + 1 : content], "big")
    if kind == _MAP:
        count *= 2
    return kind, count + (first in _EXTENSIONS), content


def _too_large(what: str, count: int, limit: int) -> TooLargeError:
    return TooLargeError(f"request holds {count} {what} at least, limit is {limit}", count=count, limit=limit)
