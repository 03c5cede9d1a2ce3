"""MessagePack bytes, a value a line, each beside its name and what it means."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from msgspec import inspect

COLUMN: Final = 40
#: Values by their first byte: bytes that follow it, and how to read them.
_NUMBERS: Final[dict[int, tuple[int, Callable[[bytes], object]]]] = {
    0xC0: (0, lambda _: "nil"),
    0xC2: (0, lambda _: "false"),
    0xC3: (0, lambda _: "true"),
    0xCA: (4, lambda data: struct.unpack(">f", data)[0]),
    0xCB: (8, lambda data: struct.unpack(">d", data)[0]),
    **{0xCC + n: (1 << n, lambda data: int.from_bytes(data, "big")) for n in range(4)},
    **{0xD0 + n: (1 << n, lambda data: int.from_bytes(data, "big", signed=True)) for n in range(4)},
}
#: Things with a length in front: what they are, and bytes of the length.
_SIZED: Final = {
    0xC4: ("binary", 1), 0xC5: ("binary", 2), 0xC6: ("binary", 4), 0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip


class Line(NamedTuple):
    """Some bytes, and what they are."""

    data: bytes
    depth: int
    text: str


def explained(data: bytes, kind: inspect.Type | None, name: str = "") -> list[Line]:
    """All values of an encoded one.

    Raises:
        ValueError: There is something behind it.
    """
    lines, rest = _value(data, kind, name, 0)
    if rest:
        raise ValueError(f"{len(rest)} bytes stand behind the value")
    return lines


def as_text(lines: list[Line]) -> str:
    """Lines of hexadecimal digits, with what they are beside them or, where they are many, below them."""
    return "\n".join(part for line in lines for part in _rows(line))


def _rows(line: Line) -> Iterator[str]:
    text = "  " * line.depth + line.text
    digits = line.data.hex(" ")
    width = COLUMN - 2
    pieces = [digits[start : start + width // 3 * 3] for start in range(0, len(digits), width // 3 * 3)] or [""]
    yield f"{pieces[0].strip():<{COLUMN}}{text}".rstrip()
    for piece in pieces[1:]:
        yield piece.strip()


def _value(data: bytes, kind: inspect.Type | None, name: str, depth: int) -> tuple[list[Line], bytes]:
    kind = _bare(kind, data[0])
    first = data[0]
    label = f"{name} = " if name else ""
    if first < 0x80 or first >= 0xE0:
        return [Line(data[:1], depth, f"{label}{first if first < 0x80 else first - 256}")], data[1:]
    if first in _NUMBERS:
        size, read = _NUMBERS[first]
        return [Line(data[: 1 + size], depth, f"{label}{read(data[1 : 1 + size])}")], data[1 + size :]
    what, count, width = _head(data)
    head, rest = data[: 1 + width], data[1 + width :]
    if what in ("text", "binary"):
        content, rest = rest[:count], rest[count:]
        told = f'"{content.decode()}"' if what == "text" else f"{count} bytes" if count else "empty binary"
        return [Line(head + content, depth, f"{label}{told}")], rest
    named = f"{name}: " if name else ""
    if what == "map":
        return _map(head, rest, count, kind, f"{named}map of {count}", depth)
    struct_name = f" ({kind.cls.__name__})" if isinstance(kind, inspect.StructType) else ""
    return _array(head, rest, count, kind, f"{named}array of {count}{struct_name}", depth)


def _array(
    head: bytes, rest: bytes, count: int, kind: inspect.Type | None, text: str, depth: int
) -> tuple[list[Line], bytes]:
    lines = [Line(head, depth, text)]
    for position in range(count):
        name, inner = _element(kind, position)
        below, rest = _value(rest, inner, name, depth + 1)
        lines += below
    return lines, rest


def _map(
    head: bytes, rest: bytes, count: int, kind: inspect.Type | None, text: str, depth: int
) -> tuple[list[Line], bytes]:
    lines = [Line(head, depth, text)]
    inner = kind.value_type if isinstance(kind, inspect.DictType) else None
    for _ in range(count):
        for part in (None, inner):
            below, rest = _value(rest, part, "", depth + 1)
            lines += below
    return lines, rest


def _element(kind: inspect.Type | None, position: int) -> tuple[str, inspect.Type | None]:
    match kind:
        case inspect.StructType(fields=fields) if position < len(fields):
            return fields[position].name, fields[position].type
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return "", item
        case inspect.TupleType(item_types=items):
            return "", items[position]
    return "", None


def _bare(kind: inspect.Type | None, first: int) -> inspect.Type | None:
    """The one of several types that an array or a map can be."""
    if not isinstance(kind, inspect.UnionType):
        return kind
    wanted: tuple[type, ...] = (inspect.StructType, inspect.ListType, inspect.TupleType, inspect.VarTupleType)
    if first in (0xDE, 0xDF) or 0x80 <= first < 0x90:
        wanted = (inspect.DictType,)
    return next((part for part in kind.types if isinstance(part, wanted)), None)


def _head(data: bytes) -> tuple[str, int, int]:
    """What begins here, how much is in it, and how many bytes after the first say so."""
    first = data[0]
    if first < 0x90:
        return "map", first & 0x0F, 0
    if first < 0xA0:
        return "array", first & 0x0F, 0
    if first < 0xC0:
        return "text", first & 0x1F, 0
    what, width = _SIZED[first]
    return what, int.from_bytes(data[1 : 1 + width], "big"), width
