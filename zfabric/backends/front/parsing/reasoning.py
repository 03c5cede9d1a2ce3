"""Reasoning between two marks, before the answer."""

from __future__ import annotations

from zfabric.backends.front.parsing.pieces import Pieces
from zfabric.backends.front.parsing.scanning import Parser


class Thinking(Parser):
    """`<think>…</think>`, then what another parser reads.

    Only what stands at the beginning is reasoning. Where the prompt ends with the first mark, the answer begins within it.

    Args:
        marks: The two around reasoning.
        opened: Whether the answer begins within it.
        rest: Reads what follows.
    """

    def __init__(self, marks: tuple[str, str], *, opened: bool, rest: Parser) -> None:
        super().__init__()
        self._open, self._close = marks
        self._opened = opened
        self._rest = rest
        self._state = "begin"

    def step(self, out: Pieces) -> bool:
        if self._state == "begin":
            begins = self.buffer.lstrip()
            if begins.startswith(self._open):
                # Some write the mark even where the prompt has it.
                self.buffer = begins.removeprefix(self._open)
                self._state = "inside"
            elif not self.over and self._open.startswith(begins):
                return False
            else:
                self._state = "inside" if self._opened else "after"
            return True
        if self._state == "inside":
            text, mark = self.take_until([self._close])
            if text:
                out.reasoning(text)
            if mark:
                out.end_reasoning()
                self._state = "after"
            return mark is not None
        text, self.buffer = self.buffer, ""
        if text:
            self._rest.feed(text, out)
        return False

    @property
    def answers(self) -> bool:
        return self._state == "after" or (self._state == "begin" and not self._opened)

    def end(self, out: Pieces) -> None:
        self._rest.finish(out)
