"""Calls that are JSON objects: of Hermes and Qwen, of Llama 3, of Mistral, and those that a guide has forced."""

from __future__ import annotations

from typing import Final

from zfabric.backends.front.parsing.json_values import SPACE, CallObject, JsonValue
from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser


class HermesCalls(Parser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, one for each call."""

    OPEN: Final = "<tool_call>"
    CLOSE: Final = "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._call: CallObject | None = None

    def step(self, out: Pieces) -> bool:
        if self._call is None:
            text, mark = self.take_until([self.OPEN])
            out.text(text)
            if mark:
                self._call = CallObject()
            return mark is not None
        call = self._call
        self.buffer = call.read(self.buffer, out)
        if call.failed and not call.begun:
            # It only looks like a call.
            self._call = None
            out.text(self.OPEN + call.raw)
            return True
        return (call.done or call.failed) and self._closed(call)

    def _closed(self, call: CallObject) -> bool:
        """Take the mark at the end of a call, and what is broken before it."""
        if call.done:
            self.buffer = self.buffer.lstrip()
            if not (self.buffer.startswith(self.CLOSE) or self.CLOSE.startswith(self.buffer)):
                self._call = None
                return True
        _, mark = self.take_until([self.CLOSE])
        if mark:
            self._call = None
        return mark is not None

    def end(self, out: Pieces) -> None:
        if self._call is None:
            super().end(out)
        elif not self._call.begun:
            out.text(self.OPEN + self._call.raw)


class LlamaCalls(Parser):
    """`{"name": …, "parameters": …}` at the beginning or after `<|python_tag|>`; several with `;` between.

    Args:
        names: Of the tools: without a mark, only an object with one of them is a call.
    """

    MARK: Final = "<|python_tag|>"
    _BETWEEN: Final = SPACE + ";,"

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self._call: CallObject | None = None
        #: Whether an object that comes now is a call, and whether any other text has come.
        self._expecting = True
        self._marked = False

    def step(self, out: Pieces) -> bool:
        if self._call is not None:
            return self._read(self._call, out)
        if self._expecting:
            rest = self.buffer.lstrip(self._BETWEEN if out.calls else SPACE)
            if rest.startswith("{"):
                self._call = CallObject(None if self._marked else self._names)
                self.buffer = rest
                return True
            if not rest and not self.over:
                return False
            if self.over or not self.MARK.startswith(rest):
                self._expecting = False
            elif rest != self.MARK:
                return False
        text, mark = self.take_until([self.MARK])
        out.text(text)
        if mark:
            self._expecting = self._marked = True
        return mark is not None

    def _read(self, call: CallObject, out: Pieces) -> bool:
        self.buffer = call.read(self.buffer, out)
        if call.failed and not call.begun:
            out.text(call.raw)
        if call.failed:
            self._expecting = False
        if call.failed or call.done:
            self._call = None
            return True
        return False

    def end(self, out: Pieces) -> None:
        if self._call is None:
            super().end(out)
        elif not self._call.begun:
            out.text(self._call.raw)


class CallList(Parser):
    """`[{"name": …, "parameters": …}, …]`, and nothing else: what a guide makes of `tool_choice="required"`."""

    def __init__(self) -> None:
        super().__init__()
        self._call: CallObject | None = None

    def step(self, out: Pieces) -> bool:
        if self._call is None:
            self.buffer = self.buffer.lstrip(SPACE + "[,")
            if not self.buffer.startswith("{"):
                if self.buffer.startswith("]"):
                    self.buffer = self.buffer[1:].lstrip()
                return False
            self._call = CallObject()
        self.buffer = self._call.read(self.buffer, out)
        if self._call.failed and not self._call.begun:
            self.buffer = self._call.raw + self.buffer
        if self._call.done or self._call.failed:
            done, self._call = self._call.done, None
            return done
        return False


class OneCall(Parser):
    """The arguments of one call, and nothing else: what a guide makes of a function that is to be called.

    Args:
        name: The function's.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._value = JsonValue()

    def step(self, out: Pieces) -> bool:
        if not self._value.kind:
            self.buffer = self.buffer.lstrip()
            if not self.buffer:
                return False
            out.call(self._name)
        end = self._value.read(self.buffer, 0)
        out.arguments(self.buffer[:end])
        self.buffer = self.buffer[end:].lstrip() if self._value.done else ""
        return False


class MistralCalls(Parser):
    """`[TOOL_CALLS][{"name": …, "arguments": …}, …]`, and of newer models `[TOOL_CALLS]name[ARGS]{…}` for each call."""

    OPEN: Final = "[TOOL_CALLS]"
    _AFTER_NAME: Final = ("[ARGS]", "[CALL_ID]", "{")

    def __init__(self) -> None:
        super().__init__()
        self._state = "text"
        self._call: CallObject | None = None
        self._value = JsonValue()

    def step(self, out: Pieces) -> bool:
        if self._state == "text":
            text, mark = self.take_until([self.OPEN])
            out.text(text)
            self._state = "open" if mark else "text"
            return mark is not None
        if self._state == "open":
            self.buffer = self.buffer.lstrip()
            if self.buffer:
                self._state = "list" if self.buffer.startswith(("[", "{")) else "name"
            return bool(self.buffer)
        if self._state == "list":
            return self._list(out)
        return self._name(out) if self._state == "name" else self._arguments(out)

    def _list(self, out: Pieces) -> bool:
        if self._call is None:
            self.buffer = self.buffer.lstrip(SPACE + "[,")
            if not self.buffer:
                return False
            if not self.buffer.startswith("{"):
                self.buffer = self.buffer.removeprefix("]")
                self._state = "text"
                return True
            self._call = CallObject()
        call = self._call
        self.buffer = call.read(self.buffer, out)
        if call.failed:
            self._state = "text"
            if not call.begun:
                out.text(self.OPEN + call.raw)
        if call.failed or call.done:
            self._call = None
            return True
        return False

    def _name(self, out: Pieces) -> bool:
        """`name[ARGS]`, `name[CALL_ID]id[ARGS]`, or the name alone before its arguments."""
        name, *_ = self.buffer.partition("[")[0].partition("{")
        rest = self.buffer[len(name) :]
        at = rest.find("{")
        if at < 0:
            return False
        self.buffer = rest[at:]
        self._state, self._value = "arguments", JsonValue()
        if name.strip():
            out.call(name.strip())
        else:
            out.text(f"{self.OPEN}{name}{rest[:at]}")
            self._state = "text"
        return True

    def _arguments(self, out: Pieces) -> bool:
        end = self._value.read(self.buffer, 0)
        out.arguments(self.buffer[:end])
        self.buffer = self.buffer[end:]
        if self._value.done or self._value.failed:
            self._state = "text"
            return True
        return False

    def end(self, out: Pieces) -> None:
        if self._state == "text":
            super().end(out)
        elif self._state == "name" or (self._call is not None and not self._call.begun):
            out.text(self.OPEN + (self.buffer if self._call is None else self._call.raw))
