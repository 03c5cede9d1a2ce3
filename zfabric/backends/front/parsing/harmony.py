"""The format of gpt-oss: messages on channels, each with a header."""

from __future__ import annotations

import re
from typing import Final

from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser, PlainText

_RECIPIENT: Final = re.compile(r"to=([\w.\-]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")


class Harmony(Parser):
    """`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f<|message|>{…}<|call|>`.

    What is on the channel of analysis is reasoning, what goes to a function is a call, all else is text.

    Args:
        begun: What the prompt has of the first message, after its role.
        calls: Whether there are tools; a call without any is text.
        rest: Reads the text.
    """

    START: Final = "<|start|>"
    MESSAGE: Final = "<|message|>"
    ENDS: Final = ("<|end|>", "<|call|>", "<|return|>")

    def __init__(self, begun: str = "", *, calls: bool, rest: Parser | None = None) -> None:
        super().__init__()
        self._calls = calls
        self._rest = rest or PlainText()
        self._state = "header"
        self._kind = "text"
        self._empty = True
        #: Kinds of messages that have been shown: another of the same kind begins a new line.
        self._shown: set[str] = set()
        self._header = ""
        head, message, body = begun.partition(self.MESSAGE)
        if message:
            self._kind, self._state, self._empty = self._kind_of(head)[0], "body", not body
        else:
            self._header = head

    def step(self, out: Pieces) -> bool:
        if self._state == "body":
            return self._body(out)
        if self._state == "between":
            _, mark = self.take_until([self.START])
            self._state = "header" if mark else "between"
            return mark is not None
        head, mark = self.take_until([self.MESSAGE, self.START])
        self._header += head
        if mark == self.START:
            self._header = ""
        elif mark:
            self._begin(out)
        return mark is not None

    def _begin(self, out: Pieces) -> None:
        self._kind, name = self._kind_of(self._header)
        self._header, self._state, self._empty = "", "body", True
        if self._kind == "call":
            out.call(name)

    def _kind_of(self, header: str) -> tuple[str, str]:
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        name = recipient.group(1).removeprefix("functions.") if recipient is not None and self._calls else ""
        if name:
            return "call", name
        return ("reasoning" if channel is not None and channel.group(1) == "analysis" else "text"), ""

    def _body(self, out: Pieces) -> bool:
        # A message that is broken off by the next has ended as well.
        text, mark = self.take_until([*self.ENDS, self.START])
        if text:
            self._show(text, out)
        if mark:
            if self._kind == "call" and self._empty:
                out.arguments("{}")
            self._state = "header" if mark == self.START else "between"
        return mark is not None

    def _show(self, text: str, out: Pieces) -> None:
        if self._kind == "call":
            out.arguments(text)
        else:
            if self._empty and self._kind in self._shown:
                text = f"\n{text}"
            self._shown.add(self._kind)
            if self._kind == "reasoning":
                out.reasoning(text)
            else:
                self._rest.feed(text, out)
        self._empty = False

    @property
    def answers(self) -> bool:
        return self._state == "body" and self._kind == "text"

    def end(self, out: Pieces) -> None:
        if self._state == "body" and self._kind == "call" and self._empty and not out.broken:
            out.arguments("{}")
        self._rest.finish(out)
