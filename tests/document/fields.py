"""Structs as tables: field, type with its bounds, default, meaning."""

from __future__ import annotations

import inspect as python_inspect
import re
import sys
from typing import Any, Final

import msgspec
from msgspec import Struct, inspect

from tests.document.markdown import power, table
from zfabric.wire import (
    answers,
    chat,
    chunks,
    explanations,
    flow,
    listings,
    load,
    messages,
    payloads,
    questions,
    sampling,
    status,
    steering,
    tasks,
    tool_calls,
)

_MODULES: Final = (
    answers, chat, chunks, explanations, flow, listings, load, messages, payloads, questions, sampling, status, steering, tasks,
    tool_calls,
)  # fmt: skip
_ATTRIBUTE: Final = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.+(?:\n {5,}\S.*)*)", re.MULTILINE)

#: What a worker hands to its backends and takes from them, and puts into other structs: these are nobody's messages.
_OF_BACKENDS: Final = (payloads.GenerateRequest, sampling.SamplingParams, tasks.ClassifyResult)
#: One chunk, which on the wire is an entry of each column.
_ROWS: Final = (answers.Chunk,)

_PLAIN: Final[dict[type, str]] = {
    inspect.BoolType: "boolean",
    inspect.NoneType: "nil",
    inspect.RawType: "anything",
    inspect.AnyType: "anything",
}


def structs() -> dict[str, type[Struct]]:
    """All structs of the wire, by name."""
    return {
        name: value
        for module in _MODULES
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Struct)
        and value.__module__ == module.__name__
        and value not in (*_OF_BACKENDS, *_ROWS)
    }


def table_of(name: str) -> str:
    """The table of one struct. Those that are maps on the wire have no positions."""
    kind = structs()[name]
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    meanings = meanings_of(kind)
    rows = []
    for position, field in enumerate(info.fields):
        place = [str(position)] if info.array_like else []
        bounds = _bounds_of(kind, field.name)
        described = type_name(field.type) + bounds
        rows.append([*place, f"`{field.name}`", described, _default(field), meanings.get(field.name, "")])
    head = ["field", "type", "default", "meaning"]
    return table(["#", *head] if info.array_like else head, rows)


def meanings_of(kind: type) -> dict[str, str]:
    """What the docstring of a class says under `Attributes:`, by name; what it says nothing of is as its base has it."""
    text = python_inspect.cleandoc(kind.__doc__ or "")
    _, _, attributes = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    for base in reversed(kind.__bases__):
        if base is not Struct and issubclass(base, Struct):
            found |= meanings_of(base)
    for match in _ATTRIBUTE.finditer(attributes):
        meaning = re.sub(r"\bNone\b", "nil", " ".join(match["text"].split()))
        found |= dict.fromkeys(match["names"].split(", "), meaning)
    return found


def type_name(kind: inspect.Type) -> str:
    """How a type is called on the wire, with its bounds."""
    match kind:
        case inspect.IntType():
            return _ranged("integer", kind)
        case inspect.FloatType():
            return _ranged("float", kind)
        case inspect.StrType(min_length=low, max_length=high):
            return "text" if high is None else f"text, {low or 0} … {high:,} characters"
        case inspect.BytesType(max_length=high):
            return "binary" if high is None else f"binary, up to {high:,} bytes"
        case inspect.LiteralType(values=values):
            return " or ".join(f'`"{value}"`' for value in values)
        case inspect.ListType(item_type=item, max_length=high):
            return _array(item, high)
        case inspect.VarTupleType(item_type=item):
            return _array(item, None)
        case inspect.TupleType(item_types=items):
            return "[" + ", ".join(type_name(item) for item in items) + "]"
        case inspect.DictType(key_type=key, value_type=value, max_length=high):
            entries = "" if high is None else f", up to {high:,} entries"
            return f"map of {type_name(key)} to {type_name(value)}{entries}"
        case inspect.UnionType(types=types):
            return " or ".join(type_name(part) for part in types)
        case inspect.StructType(cls=cls):
            return cls.__name__
    return _PLAIN[type(kind)]


def _array(item: inspect.Type, high: int | None) -> str:
    inner = type_name(item)
    if " or " in inner or "," in inner.partition("[")[0]:
        inner = f"({inner})"
    return f"array of {inner}" + ("" if high is None else f"; up to {high:,} elements")


def _ranged(name: str, kind: inspect.IntType | inspect.FloatType) -> str:
    low, high = kind.ge, kind.le if kind.lt is None else kind.lt - 1
    if high == sys.float_info.max:
        return "finite float"
    if low is None or high is None:
        return name if low is None else f"{name}, at least {low:,}"
    return f"{name} {_number(low)} … {_number(high)}"


def _number(value: float) -> str:
    return power(value) if isinstance(value, int) else f"{value:,.0f}"


def _bounds_of(kind: type[Struct], field: str) -> str:
    """Bounds of sampling parameters, which are checked by their name."""
    if kind.__module__ != sampling.__name__:
        return ""
    if field in sampling.ITEMS_MAX:
        return f"; up to {sampling.ITEMS_MAX[field]:,} items"
    if field not in sampling.RANGES:
        return ""
    low, high = sampling.RANGES[field]
    least = "more than 0" if low == 0 and field in sampling.POSITIVE else _plain(low)
    also = ", but 0" if low != 0 and field in sampling.POSITIVE else ""
    return f": {least} … {_plain(high)}{also}"


def _plain(value: float) -> str:
    return power(value) if isinstance(value, int) else f"{value:g}"


def _default(field: inspect.Field) -> str:
    if field.required:
        return "–"
    value: Any = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    return f"`{_told(value)}`"


def _told(value: Any) -> str:
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case bytes() if not value:
            return "empty binary"
        case msgspec.Raw():
            return _told(msgspec.msgpack.decode(value))
        case str():
            return f'"{value}"'
        case list() | tuple() | Struct():
            return "[]" if isinstance(value, Struct) or not value else str(list(value))
        case dict():
            return "{}" if not value else str(value)
    return str(value)
