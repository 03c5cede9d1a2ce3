"""Calls between marks whose arguments are no JSON object with a name: of Qwen3-Coder and of DeepSeek."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from zfabric.backends.front.parsing.json_values import JsonValue
from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser

_NUMBERS: Final = frozenset({"integer", "number"})


class QwenCoderCalls(Parser):
    """`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`, told parameter by parameter.

    Args:
        schemas: Of the tools' parameters, by name of the tool: a value is written without quotes, so its type says what it is.
    """

    OPEN: Final = "<tool_call>"
    CLOSE: Final = "</tool_call>"
    _FUNCTION: Final = "<function="
    _FUNCTION_END: Final = "</function>"
    _PARAMETER: Final = "<parameter="
    _PARAMETER_END: Final = "</parameter>"

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._schemas = schemas
        self._state = "text"
        self._name = self._key = ""
        self._count = 0

    def step(self, out: Pieces) -> bool:
        if self._state == "text":
            # Some leave the outer mark out.
            text, mark = self.take_until([self.OPEN, self._FUNCTION])
            out.text(text)
            self._state = {None: "text", self.OPEN: "opened"}.get(mark, "name")
            return mark is not None
        if self._state == "opened":
            return self._opened(out)
        if self._state == "name":
            return self._begin(out)
        if self._state == "value":
            return self._value(out)
        if self._state == "parameters":
            _, mark = self.take_until([self._PARAMETER, self._FUNCTION_END, self.CLOSE])
            if mark == self._PARAMETER:
                self._state = "key"
            elif mark:
                out.arguments("}" if self._count else "{}")
                self._state = "text" if mark == self.CLOSE else "closing"
            return mark is not None
        if self._state == "key":
            if ">" not in self.buffer:
                return False
            self._key, _, self.buffer = self.buffer.partition(">")
            self._state = "value"
            return True
        return self._closing()

    def _opened(self, out: Pieces) -> bool:
        rest = self.buffer.lstrip()
        if rest.startswith(self._FUNCTION):
            self.buffer = rest.removeprefix(self._FUNCTION)
            self._state = "name"
        elif self.over or not self._FUNCTION.startswith(rest):
            # It only looks like a call.
            out.text(self.OPEN)
            self._state = "text"
        else:
            return False
        return True

    def _begin(self, out: Pieces) -> bool:
        if ">" not in self.buffer:
            return False
        name, _, self.buffer = self.buffer.partition(">")
        self._name, self._count, self._state = name.strip().strip('"'), 0, "parameters"
        if self._name:
            out.call(self._name)
        else:
            out.text(f"{self._FUNCTION}{name}>")
            self._state = "text"
        return True

    def _value(self, out: Pieces) -> bool:
        marks = [self._PARAMETER_END, self._PARAMETER, self._FUNCTION_END]
        at = min([found for mark in marks if (found := self.buffer.find(mark)) >= 0], default=-1)
        if at < 0:
            return False
        written, self.buffer = self.buffer[:at], self.buffer[at:].removeprefix(self._PARAMETER_END)
        key = self._key.strip().strip('"')
        properties = self._schemas.get(self._name, {}).get("properties") or {}
        value = typed(written.removeprefix("\n").removesuffix("\n"), properties.get(key))
        before = ", " if self._count else "{"
        out.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
        self._count += 1
        self._state = "parameters"
        return True

    def _closing(self) -> bool:
        """The outer mark after the inner one, if it is there."""
        self.buffer = self.buffer.lstrip()
        if self.buffer.startswith(self.CLOSE):
            self.buffer = self.buffer.removeprefix(self.CLOSE)
        elif self.CLOSE.startswith(self.buffer):
            if self.over:
                self.buffer = ""
            return False
        self._state = "text"
        return True

    def end(self, out: Pieces) -> None:
        if self._state == "name":
            out.text(self._FUNCTION + self.buffer)
        elif self._state == "text":
            super().end(out)


def typed(written: str, schema: Any) -> Any:
    """A value that was written without quotes, by the type that its schema says: a text where it says none that fits."""
    kinds = _kinds(schema)
    if "null" in kinds and written.strip() in ("null", "None"):
        return None
    if "boolean" in kinds and written.strip().lower() in ("true", "false"):
        return written.strip().lower() == "true"
    if kinds & _NUMBERS or kinds & {"object", "array"}:
        found = _literal(written)
        fits = {int: _NUMBERS, float: _NUMBERS, dict: {"object"}, list: {"array"}}.get(type(found))
        if fits is not None and kinds & fits:
            return found
    return written


def _literal(written: str) -> Any:
    """A value as JSON, or as Python has it; None for neither."""
    try:
        return json.loads(written)
    except ValueError:
        pass
    try:
        return ast.literal_eval(written.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _kinds(schema: Any) -> frozenset[str]:
    """Types that a JSON schema allows, as far as it says so at once."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kind = schema.get("type")
    found = {kind} if isinstance(kind, str) else {item for item in _listed(kind) if isinstance(item, str)}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for choice in _listed(choices):
            found |= _kinds(choice)
    return frozenset(found)


def _listed(value: Any) -> Sequence[Any]:
    """A list of a schema; nothing where a caller has written something else there."""
    return value if isinstance(value, list | tuple) else ()


class DeepseekCalls(Parser):
    """`<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, a line of "```json", arguments, "```<｜tool▁call▁end｜>"; and of V3.1
    `<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`; all between two marks of their own.
    """

    OPEN: Final = "<｜tool▁calls▁begin｜>"
    CLOSE: Final = "<｜tool▁calls▁end｜>"
    CALL: Final = "<｜tool▁call▁begin｜>"
    CALL_END: Final = "<｜tool▁call▁end｜>"
    SEPARATOR: Final = "<｜tool▁sep｜>"
    _FENCE: Final = "```json"

    def __init__(self) -> None:
        super().__init__()
        self._state = "text"
        self._value = JsonValue()

    def step(self, out: Pieces) -> bool:
        if self._state == "text":
            text, mark = self.take_until([self.OPEN, self.CALL])
            out.text(text)
            self._state = {None: "text", self.OPEN: "calls"}.get(mark, "name")
            return mark is not None
        if self._state == "calls":
            _, mark = self.take_until([self.CALL, self.CLOSE])
            self._state = {None: "calls", self.CLOSE: "text"}.get(mark, "name")
            return mark is not None
        if self._state == "name":
            return self._name(out)
        if self._state == "arguments":
            end = self._value.read(self.buffer, 0)
            out.arguments(self.buffer[:end])
            self.buffer = self.buffer[end:]
            self._state = "after" if self._value.done or self._value.failed else "arguments"
            return self._state == "after"
        _, mark = self.take_until([self.CALL_END])
        self._state = "calls" if mark else "after"
        return mark is not None

    def _name(self, out: Pieces) -> bool:
        """Up to where the arguments begin."""
        head, separator, rest = self.buffer.partition(self.SEPARATOR)
        at = rest.find("{")
        if not separator or at < 0:
            return False
        name = rest[:at].partition(self._FENCE)[0] if head.strip() == "function" else head
        self.buffer = rest[at:]
        self._state, self._value = "arguments", JsonValue()
        if name.strip():
            out.call(name.strip())
        else:
            out.text(f"{self.CALL}{head}{separator}{rest[:at]}")
            self._state = "text"
        return True

    def end(self, out: Pieces) -> None:
        if self._state == "text":
            super().end(out)
