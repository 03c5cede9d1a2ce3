"""What parsers find in the text of one choice, in its order: text, reasoning, and pieces of calls."""

from __future__ import annotations

import json
from collections.abc import Callable

from zfabric.wire.payloads import Delta
from zfabric.wire.tool_calls import ToolCallDelta, joined_calls


class Pieces:
    """Collects what is found, and gives it out as deltas.

    What stands between two kinds of pieces are line breaks of the chat template: white space around reasoning, before a call
    and after one is no part of the text. So what is given out is a function of what the model has written so far, however
    that was cut.

    Args:
        name_call: Makes the id of a choice's call of such a number.
        unseen: Characters of all that which the reader of a continued answer has: they are left out.
        parallel: Whether more than one call is given.

    Attributes:
        calls: How many calls have begun.
        broken: The answer has been broken off by its length.
    """

    def __init__(self, name_call: Callable[[int], str], *, unseen: int = 0, parallel: bool = True) -> None:
        self._name_call = name_call
        self._unseen = unseen
        self._parallel = parallel
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        #: White space at the end of the present run, which is part of it only if more comes.
        self._space = ""
        self._reasons = False
        self._shown = False
        #: Reasoning or a call came before the present run.
        self._follows = False
        self._dropped = False
        self._arguments: list[str] = []
        self.calls = 0
        self.broken = False

    # ── told by parsers ─────────────────────────────────────────────────────────────────────────────────────────────

    def text(self, piece: str) -> None:
        """More of the answer's text."""
        if not piece:
            return
        self.end_reasoning()
        shown = self._run(piece)
        if shown:
            self._text.append(self._cut(shown))

    def exactly(self, piece: str) -> None:
        """Text that the answer begins with, white space and all."""
        if piece:
            self._text.append(self._cut(piece))

    def reasoning(self, piece: str) -> None:
        """More of what the model says to itself."""
        if not self._reasons:
            self._begin()
            self._reasons = self._follows = True
        shown = self._run(piece)
        if shown:
            self._reasoning.append(self._cut(shown))

    def end_reasoning(self) -> None:
        """What follows is something else."""
        if self._reasons:
            self._begin()
            self._reasons = False

    def call(self, name: str) -> None:
        """A call begins; its name is whole."""
        self._begin()
        self._reasons, self._follows = False, True
        self._dropped = self.calls > 0 and not self._parallel
        if self._dropped:
            return
        index, self.calls = self.calls, self.calls + 1
        self._arguments = []
        if self._unseen:
            self._unseen = max(0, self._unseen - len(name))
        else:
            self._calls.append(ToolCallDelta(index=index, id=self._name_call(index), name=name))

    def arguments(self, piece: str) -> None:
        """More of the arguments of the call that has begun."""
        if self._dropped or not piece:
            return
        self._arguments.append(piece)
        if shown := self._cut(piece):
            self._calls.append(ToolCallDelta(index=self.calls - 1, arguments=shown))

    def finish(self) -> None:
        """Nothing more comes: white space at the end is the text's, unless it followed a call."""
        if self._space and not self._reasons and (self._shown or not self._follows):
            self._text.append(self._cut(self._space))
        self._space = ""

    # ── given out ───────────────────────────────────────────────────────────────────────────────────────────────────

    def fill(self, delta: Delta) -> None:
        """Put all that was found since the last time into a delta, in place of its text."""
        delta.text = "".join(self._text)
        delta.reasoning = "".join(self._reasoning)
        delta.tool_calls = joined_calls(self._calls)
        self._text, self._reasoning, self._calls = [], [], []

    @property
    def called(self) -> bool:
        """Whether there are calls, the last of them whole."""
        if not self.calls:
            return False
        try:
            json.loads("".join(self._arguments))
        except ValueError:
            return False
        return True

    def _begin(self) -> None:
        self._space = ""
        self._shown = False

    def _run(self, piece: str) -> str:
        """What may be shown of a run: no white space at its beginning, where something came before it, or at its end."""
        whole = self._space + piece
        if not self._shown and self._follows:
            whole = whole.lstrip()
        shown = whole.rstrip()
        self._space = whole[len(shown) :]
        self._shown = self._shown or bool(shown)
        return shown

    def _cut(self, piece: str) -> str:
        cut = min(self._unseen, len(piece))
        self._unseen -= cut
        return piece[cut:]
