"""The protocol as its pages have it: kinds by name, structs by their tables."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_ROW = re.compile(
    r"^\| (?P<place>\d+) \| `(?P<name>\w+)` \| (?P<type>[^|]*) \| (?P<default>–|`[^|]*`) \| [^|]*\|$", re.MULTILINE
)
_KIND = re.compile(r"^\| `(?P<byte>[0-9a-f]{2})` \| \[(?P<name>\w+)\]", re.MULTILINE)
_REQUIRED = object()
_WORDS = {"nil": None, "empty binary": b""}


class Field(NamedTuple):
    """A row of a struct's table."""

    name: str
    type: str
    default: Any


@cache
def fields_of(struct: str) -> tuple[Field, ...]:
    """The fields of a struct, in order."""
    page = (_DOCS / "protocol" / "messages.md").read_text()
    _, _, below = page.partition(f"<!-- generated: fields {struct} -->")
    table, _, _ = below.partition("<!-- end -->")
    rows = list(_ROW.finditer(table.replace("\\|", "/")))
    assert [int(row["place"]) for row in rows] == list(range(len(rows)))
    assert rows, f"there is no table of {struct}"
    return tuple(Field(row["name"], row["type"], _default(row["default"])) for row in rows)


def _default(cell: str) -> Any:
    if cell == "–":
        return _REQUIRED
    word = cell.strip("`")
    return _WORDS[word] if word in _WORDS else json.loads(word)


@cache
def body_of(operation: str) -> str:
    """The struct that is the body of an operation's request: the first table of its section."""
    page = (_DOCS / "protocol" / "messages.md").read_text()
    _, _, section = page.partition(f"\n### {operation}\n")
    match = re.search(r"<!-- generated: fields (\w+) -->", section)
    assert match is not None
    return match[1]


@cache
def sampling_of(operation: str) -> str:
    """The struct of its sampling parameters."""
    return next(field.type for field in fields_of(body_of(operation)) if field.name == "sampling")


@cache
def kinds() -> dict[str, int]:
    """The byte of each kind."""
    found = {row["name"]: int(row["byte"], 16) for row in _KIND.finditer((_DOCS / "protocol.md").read_text())}
    assert "SUBMIT" in found
    return found


@cache
def version() -> int:
    """The version that the pages are of."""
    match = re.search(r"This is version (\d+) of the protocol", (_DOCS / "protocol.md").read_text())
    assert match is not None
    return int(match[1])


def struct(name: str, /, **values: Any) -> list[Any]:
    """A struct as its array, with defaults for what is not given."""
    known = fields_of(name)
    assert values.keys() <= {field.name for field in known}
    made = [values.get(field.name, field.default) for field in known]
    assert _REQUIRED not in made, f"{name} lacks a field"
    return made


def named(name: str, array: list[Any]) -> dict[str, Any]:
    """A struct's fields by name: defaults for those that were left out, without those that nobody knows."""
    known = fields_of(name)
    rest = [field.default for field in known[len(array) :]]
    return dict(zip((field.name for field in known), [*array, *rest], strict=False))


def message(kind: str, *content: Any) -> bytes:
    """The first frame of a message."""
    return bytes([kinds()[kind]]) + b"".join(packed(part) for part in content)


def packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def kind_of(frame: bytes) -> str:
    """The name of a message's kind, or "" for one that nobody knows."""
    return next((name for name, byte in kinds().items() if byte == frame[0]), "")
