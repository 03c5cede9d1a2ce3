"""Calls as a list of Python's: `[name(key=value, …), …]`, of Llama 3.2 and Llama 4."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

from zfabric.backends.front.parsing.json_values import SPACE
from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser

_NAME: Final = re.compile(r"[A-Za-z_][\w.]*")
#: JSON's words, which some models write among Python's.
_WORDS: Final = {"true": True, "false": False, "null": None}
_OPEN: Final = "[{("
_CLOSE: Final = "]})"


class PythonicCalls(Parser):
    """Told argument by argument. Only a list at the beginning, or after its mark, whose first name is a tool's is one of calls.

    Args:
        names: Of the tools.
    """

    MARKS: Final = ("<|python_start|>", "<|python_end|>")

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self._state = "begin"
        self._count = 0

    def step(self, out: Pieces) -> bool:
        if self._state == "begin":
            return self._begin()
        if self._state == "call":
            return self._call(out)
        if self._state == "arguments":
            return self._argument(out)
        if self._state == "next":
            return self._next()
        text, mark = self.take_until(self.MARKS)
        out.text(text)
        if mark == self.MARKS[0]:
            self._state = "begin"
        return mark is not None

    def _begin(self) -> bool:
        """Whether a list of calls begins here."""
        rest = self.buffer.lstrip()
        if not self.over:
            if not rest or (self.MARKS[0].startswith(rest) and rest != self.MARKS[0]):
                return False
            if rest.startswith("["):
                inner = rest[1:].lstrip()
                name = _NAME.match(inner)
                if not inner or (name is not None and name.end() == len(inner)):
                    return False
        inner = rest[1:].lstrip() if rest.startswith("[") else ""
        name = _NAME.match(inner)
        if name is not None and inner.startswith("(", name.end()) and name.group() in self._names:
            self.buffer = inner
            self._state = "call"
            return True
        self._state = "text"
        return bool(self.buffer)

    def _call(self, out: Pieces) -> bool:
        """The name of a call, up to its arguments."""
        name, bracket, rest = self.buffer.partition("(")
        if not bracket:
            return False
        if not name.strip():
            self._state = "text"
            return True
        self.buffer = rest
        self._count, self._state = 0, "arguments"
        out.call(name.strip())
        out.arguments("{")
        return True

    def _argument(self, out: Pieces) -> bool:
        """One argument, when its end has come."""
        end = _end_of(self.buffer)
        if end is None:
            return False
        written, mark, self.buffer = self.buffer[:end], self.buffer[end], self.buffer[end + 1 :]
        key, equals, value = written.partition("=")
        if equals:
            text = f"{json.dumps(key.strip())}: {json.dumps(_value(value.strip()), ensure_ascii=False)}"
            out.arguments(f", {text}" if self._count else text)
            self._count += 1
        if mark == ")":
            out.arguments("}")
            self._state = "next"
        return True

    def _next(self) -> bool:
        """Between two calls, or after the last."""
        self.buffer = self.buffer.lstrip(SPACE + ",")
        if not self.buffer:
            return False
        self._state = "text" if self.buffer.startswith("]") else "call"
        self.buffer = self.buffer.removeprefix("]")
        return True

    def end(self, out: Pieces) -> None:
        if self._state == "text":
            super().end(out)


def _end_of(text: str) -> int | None:
    """Where an argument ends: at a comma or a bracket of its own level, outside of strings; None if that has not come."""
    depth, quote, at = 0, "", 0
    while at < len(text):
        character = text[at]
        if quote:
            if character == "\\":
                at += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif depth == 0 and character in ",)":
            return at
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        at += 1
    return None


def _value(written: str) -> Any:
    """A value as Python writes it; what is none is told as the text that it is."""
    try:
        tree = ast.parse(written, mode="eval").body
        return ast.literal_eval(_Words().visit(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return written


class _Words(ast.NodeTransformer):
    """Puts Python's constants in place of JSON's words."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node
