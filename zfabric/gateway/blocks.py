"""An answer as a row of blocks, as newer APIs have it: reasoning, text and calls, each begun once, gone on with, and closed."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Literal, NamedTuple

from zfabric.client.results import Choice
from zfabric.errors import ProtocolError
from zfabric.wire.payloads import Delta, TokenLogprobs

Kind = Literal["reasoning", "text", "call"]


class Block:
    """One of them.

    Attributes:
        kind: What it is made of.
        index: Its place in the row.
        id, name: Of a call.
        logprobs: Of a text, if asked for.
    """

    __slots__ = ("_parts", "call", "id", "index", "kind", "logprobs", "name")

    def __init__(self, kind: Kind, index: int, *, call: int = -1, id: str = "", name: str = "") -> None:  # noqa: A002
        self.kind = kind
        self.index = index
        self.call = call
        self.id = id
        self.name = name
        self.logprobs: list[TokenLogprobs] = []
        self._parts: list[str] = []

    def extend(self, piece: str) -> None:
        """Add what arrived."""
        self._parts.append(piece)

    @property
    def content(self) -> str:
        """All of it so far: of a call, its arguments."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""


class Step(enum.Enum):
    """What happens to a block."""

    BEGUN = enum.auto()
    MORE = enum.auto()
    CLOSED = enum.auto()


class Change(NamedTuple):
    """A step of a block, and the piece that it got."""

    step: Step
    block: Block
    piece: str = ""


class Blocks:
    """Puts the deltas of one choice into blocks, one open at a time.

    Attributes:
        row: All blocks that have begun.
    """

    def __init__(self) -> None:
        self.row: list[Block] = []
        self._open: Block | None = None

    @property
    def open(self) -> Block | None:
        """The block that goes on with the next piece of its kind."""
        return self._open

    def of(self, delta: Delta) -> Iterator[Change]:
        """What a delta changes: within one, reasoning stands before text, and text before calls.

        Raises:
            ProtocolError: A piece is of a call that was closed, or that nothing began.
        """
        if delta.reasoning:
            yield from self._add("reasoning", delta.reasoning)
        if delta.text:
            yield from self._add("text", delta.text)
        for piece in delta.tool_calls or ():
            if self._open is None or self._open.call != piece.index:
                if piece.name is None:
                    raise ProtocolError(f"a piece is of call {piece.index}, which is not open", index=piece.index)
                yield from self._begin(
                    Block("call", len(self.row), call=piece.index, id=piece.id or "", name=piece.name)
                )
            if piece.arguments:
                yield self._more(piece.arguments)
        # What no text goes with, as an end token, still has its log-probability.
        if delta.logprobs is not None and self._open is not None and self._open.kind == "text":
            self._open.logprobs += delta.logprobs

    def close(self) -> Iterator[Change]:
        """The end of the answer."""
        if self._open is not None:
            yield Change(Step.CLOSED, self._open)
            self._open = None

    def _add(self, kind: Kind, piece: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(kind, len(self.row)))
        yield self._more(piece)

    def _begin(self, block: Block) -> Iterator[Change]:
        yield from self.close()
        self.row.append(block)
        self._open = block
        yield Change(Step.BEGUN, block)

    def _more(self, piece: str) -> Change:
        assert self._open is not None
        self._open.extend(piece)
        return Change(Step.MORE, self._open, piece)


def blocks_of(choice: Choice) -> list[Block]:
    """A whole answer as blocks, in the order in which models make them."""
    delta = Delta(text=choice.text, reasoning=choice.reasoning, logprobs=choice.logprobs)
    blocks = Blocks()
    for _ in blocks.of(delta):
        pass
    row = blocks.row
    for number, call in enumerate(choice.tool_calls):
        row.append(Block("call", len(row), call=number, id=call.id, name=call.name))
        row[-1].extend(call.arguments)
    return row
