"""Calls of Gemma: FunctionGemma and Gemma 4."""

from __future__ import annotations

import json
from typing import Any

from zfabric.backends.front.parsing.json_values import SPACE, loads
from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser, beginning


class GemmaCalls(Parser):
    """`call:name{key:<|"|>text<|"|>,count:3}` between two marks. It is told as JSON, text as it comes.

    Args:
        open, close: The marks around a call.
        quote: The mark around a text.
    """

    def __init__(self, open: str, close: str, quote: str) -> None:  # noqa: A002 — its name
        super().__init__()
        self._marks = open, close
        self._quote = quote
        self._state = "text"
        #: Of the objects and lists that are open: what closes each.
        self._nested: list[str] = []

    def step(self, out: Pieces) -> bool:
        if self._state == "text":
            text, mark = self.take_until([self._marks[0]])
            out.text(text)
            self._state = "name" if mark else "text"
            return mark is not None
        if self._state == "name":
            return self._name(out)
        if self._state == "quoted":
            return self._quoted(out)
        if self._state == "after":
            _, mark = self.take_until([self._marks[1]])
            self._state = "text" if mark else "after"
            return mark is not None
        return self._structure(out)

    def _name(self, out: Pieces) -> bool:
        name, brace, rest = self.buffer.partition("{")
        if not brace:
            return False
        self.buffer = rest
        called = name.strip().removeprefix("call:").strip()
        if not called:
            out.text(f"{self._marks[0]}{name}{{")
            self._state = "text"
            return True
        self._nested, self._state = ["}"], "key"
        out.call(called)
        out.arguments("{")
        return True

    def _quoted(self, out: Pieces) -> bool:
        """Some of a text."""
        at = self.buffer.find(self._quote)
        end = at if at >= 0 else len(self.buffer) - beginning(self.buffer, [self._quote])
        out.arguments(json.dumps(self.buffer[:end], ensure_ascii=False)[1:-1])
        self.buffer = self.buffer[end:]
        if at < 0:
            return False
        self.buffer = self.buffer[len(self._quote) :]
        out.arguments('"')
        self._state = "next"
        return True

    def _structure(self, out: Pieces) -> bool:
        """A key, the beginning of a value, or what comes between two."""
        self.buffer = self.buffer.lstrip(SPACE)
        if not self.buffer:
            return False
        mark = self.buffer[0]
        if (mark in "}]" and self._state != "value") or mark == "]":
            return self._close(mark, out)
        if self._state == "next":
            self.buffer = self.buffer[1:]
            if mark == ",":
                out.arguments(", ")
                self._state = "key" if self._nested[-1] == "}" else "value"
            return True
        return self._key(out) if self._state == "key" else self._value(mark, out)

    def _key(self, out: Pieces) -> bool:
        key, colon, rest = self.buffer.partition(":")
        if not colon:
            return False
        self.buffer = rest
        out.arguments(json.dumps(key.strip().replace(self._quote, ""), ensure_ascii=False) + ": ")
        self._state = "value"
        return True

    def _value(self, mark: str, out: Pieces) -> bool:
        if self.buffer.startswith(self._quote):
            self.buffer = self.buffer.removeprefix(self._quote)
            out.arguments('"')
            self._state = "quoted"
            return True
        if self._quote.startswith(self.buffer):
            return False
        if mark in "{[":
            self.buffer = self.buffer[1:]
            out.arguments(mark)
            self._nested.append("}" if mark == "{" else "]")
            self._state = "key" if mark == "{" else "value"
            return True
        end = min([at for stop in ",}]" if (at := self.buffer.find(stop)) >= 0], default=-1)
        if end < 0:
            return False
        word = self.buffer[:end].strip()
        self.buffer = self.buffer[end:]
        out.arguments(json.dumps(_word(word), ensure_ascii=False))
        self._state = "next"
        return True

    def _close(self, mark: str, out: Pieces) -> bool:
        self.buffer = self.buffer[1:]
        out.arguments(self._nested.pop())
        self._state = "next" if self._nested else "after"
        return True

    def end(self, out: Pieces) -> None:
        if self._state == "text":
            super().end(out)
        elif self._state == "name":
            out.text(self._marks[0] + self.buffer)


def _word(written: str) -> Any:
    """What stands without quotes: a number, true, false or null, and a text else."""
    found = loads(written)
    return written if found is None and written != "null" else found
