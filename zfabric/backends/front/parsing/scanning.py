"""Marks of a chat format in a text that comes in pieces: none is ever shown, not even in part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from zfabric.backends.front.parsing.pieces import Pieces


def first_of(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of several marks begins, and which it is."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found) if found else None


def beginning(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of a text that may become one of the marks."""
    longest = 0
    for mark in marks:
        at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
        while at >= 0 and not mark.startswith(text[at:]):
            at = text.find(mark[0], at + 1)
        if at >= 0:
            longest = max(longest, len(text) - at)
    return longest


class Parser(ABC):
    """Reads the text of one choice as it comes.

    What it tells is a function of the text so far, and not of the pieces in which that came: a step looks at the buffer alone,
    and takes from it what no further text can change.
    """

    def __init__(self) -> None:
        self.buffer = ""
        self.over = False

    def feed(self, text: str, out: Pieces) -> None:
        """Take in more."""
        self.buffer += text
        while self.step(out):
            pass

    def finish(self, out: Pieces) -> None:
        """Nothing more comes."""
        self.over = True
        while self.step(out):
            pass
        self.end(out)

    @property
    def answers(self) -> bool:
        """Whether what comes next is the answer, and no reasoning before it."""
        return True

    @abstractmethod
    def step(self, out: Pieces) -> bool:
        """Take something from the buffer. Returns whether there may be more to take."""

    def end(self, out: Pieces) -> None:
        """What is left when all has come: by default a text that looked like more."""
        rest, self.buffer = self.buffer, ""
        if rest:
            out.text(rest)

    def take_until(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """What comes before the first of the marks, and which that is; the mark is taken as well. Without one: what surely comes
        before one, and None.
        """
        found = first_of(self.buffer, marks)
        if found is not None:
            at, mark = found
            before, self.buffer = self.buffer[:at], self.buffer[at + len(mark) :]
            return before, mark
        keep = 0 if self.over else beginning(self.buffer, marks)
        before, self.buffer = self.buffer[: len(self.buffer) - keep], self.buffer[len(self.buffer) - keep :]
        return before, None

    def undecided(self, *marks: str) -> bool:
        """Whether more text may make the buffer begin with one of the marks, which it does not yet."""
        return not self.over and any(mark.startswith(self.buffer) for mark in marks)


class PlainText(Parser):
    """Text and nothing else."""

    def step(self, out: Pieces) -> bool:
        text, self.buffer = self.buffer, ""
        if text:
            out.text(text)
        return False
