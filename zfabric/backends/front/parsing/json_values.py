"""JSON as it is written: values whose end is found, and objects that are calls."""

from __future__ import annotations

import json
import string
from typing import Any, Final

from zfabric.backends.front.parsing.pieces import Pieces

SPACE: Final = " \t\r\n"
#: What stands in JSON outside of strings.
_OUTSIDE: Final = frozenset(string.ascii_letters + string.digits + SPACE + "{}[]:,+-.")
#: What ends a number or a word.
_AFTER_SCALAR: Final = frozenset(SPACE + ",]};")
#: Keys that hold a call's arguments.
ARGUMENTS: Final = frozenset({"arguments", "parameters"})


class JsonValue:
    """Finds the end of a value.

    Attributes:
        done: It has ended.
        failed: It is no JSON.
        kind: Its first character, "" before that.
    """

    __slots__ = ("_depth", "_escaped", "_string", "done", "failed", "kind")

    def __init__(self) -> None:
        self.kind = ""
        self.done = self.failed = False
        self._depth = 0
        self._string = self._escaped = False

    def read(self, text: str, at: int) -> int:
        """Read on from a place. Returns where the value, or the text, ends."""
        while at < len(text) and not (self.done or self.failed):
            character = text[at]
            if not self.kind:
                self.kind = character
                if character in "}],:":
                    self.failed = True
                    break
            if not self._string and self._depth == 0 and self.kind not in '"{[' and character in _AFTER_SCALAR:
                self.done = True
                break
            self._enter(character)
            if not self.failed:
                at += 1
        return at

    def _enter(self, character: str) -> None:
        if self._string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._string = False
                self.done = self._depth == 0
        elif character == '"':
            self._string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        elif character not in _OUTSIDE:
            self.failed = True


class CallObject:
    """An object that is a call: `{"name": …, "arguments": {…}}`, or with "parameters". Arguments are told as they come.

    A call is told when its name and the beginning of its arguments have been read; until then it may turn out to be none.

    Args:
        names: Those that a call may have; None for any. Only a call with a name of any kind may have no arguments.

    Attributes:
        done: The object has ended.
        failed: It is no call, or no JSON.
        begun: Whether the call has been told.
        raw: What has been read of it, while it has not.
    """

    __slots__ = ("_early", "_key", "_name", "_names", "_part", "_state", "_value", "begun", "done", "failed", "raw")

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self._names = names
        self._state = "open"
        self._key = ""
        #: Of the value that is being read: all of it, but what has been told.
        self._part = ""
        self._value = JsonValue()
        self._name: str | None = None
        #: Arguments that came before the name.
        self._early: str | None = None
        self.begun = self.done = self.failed = False
        self.raw = ""

    def read(self, text: str, out: Pieces) -> str:
        """Read on. Returns what is left: nothing unless it is done or has failed."""
        at = 0
        while at < len(text) and not (self.done or self.failed):
            before = at
            read = self._read_part if self._state in ("key", "value") else self._read_mark
            at = read(text, at, out)
            if not self.begun:
                self.raw += text[before:at]
        return text[at:]

    def _read_mark(self, text: str, at: int, out: Pieces) -> int:
        """White space, or what stands between keys and values."""
        mark = text[at]
        if mark in SPACE:
            return at + 1
        if (self._state == "keys" and mark == '"') or self._state == "values":
            self._state = "key" if self._state == "keys" else "value"
            self._part, self._value = "", JsonValue()
            return at
        if mark == "}" and self._state in ("keys", "end"):
            self._close(out)
            return at + 1 - self.failed
        following = {("open", "{"): "keys", ("colon", ":"): "values", ("end", ","): "keys"}.get((self._state, mark))
        self.failed = following is None
        self._state = following or self._state
        return at + 1 - self.failed

    def _read_part(self, text: str, at: int, out: Pieces) -> int:
        """Some of a key or a value."""
        end = self._value.read(text, at)
        self._part += text[at:end]
        self.failed = self._value.failed
        if self._state == "value" and self._key in ARGUMENTS and self._value.kind == "{" and self._name is not None:
            if not self.begun:
                self._begin(out)
            out.arguments(self._part)
            self._part = ""
        if self._value.done:
            if self._state == "key":
                self._key, self._state = str(loads(self._part)), "colon"
            else:
                self._state = "end"
                self._take_value(out)
        return end

    def _take_value(self, out: Pieces) -> None:
        if self._key == "name":
            name = loads(self._part)
            self.failed = not isinstance(name, str) or not name or (self._names is not None and name not in self._names)
            if not self.failed and self._name is None:
                self._name = name
                if self._early is not None:
                    self._begin(out)
                    out.arguments(self._early)
        elif self._key in ARGUMENTS and not self.begun:
            self._early = written_arguments(self._part)
            if self._name is not None:
                self._begin(out)
                out.arguments(self._early)

    def _begin(self, out: Pieces) -> None:
        assert self._name is not None
        out.call(self._name)
        self.begun = True

    def _close(self, out: Pieces) -> None:
        self.failed = not self.begun and (self._name is None or self._names is not None)
        self.done = not self.failed
        if self.done and not self.begun:
            self._begin(out)
            out.arguments("{}")


def written_arguments(value: str) -> str:
    """Arguments of a call as one JSON text: some models write them as a text of their own."""
    inner = loads(value)
    if isinstance(inner, str) and isinstance(loads(inner), dict):
        return inner
    return "{}" if inner is None else value


def loads(text: str) -> Any:
    """A value; None for what is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None
