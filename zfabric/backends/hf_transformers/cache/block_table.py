"""Where the tokens of a row lie: a table of blocks for each group of layers that share some."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from zfabric.backends.hf_transformers.cache.free_blocks import runs_of


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one row for one group of layers.

    Attributes:
        blocks: In the order of the row's tokens.
        runs: Stretches of them that lie side by side, as begins and ends.
        given_back: How many of the first ones the row has no more; their numbers stay, and may be another's.
    """

    blocks: list[int] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    given_back: int = 0

    def extend(self, begin: int, end: int) -> None:
        """More, which lie side by side."""
        self.blocks.extend(range(begin, end))
        runs = self.runs
        if runs and runs[-1][1] == begin:
            runs[-1][1] = end
        else:
            runs.append([begin, end])

    def clear(self) -> None:
        """None at all."""
        self.blocks.clear()
        self.runs.clear()


class BlockTables:
    """The blocks of one row.

    Args:
        each: A table for each group. Where there are several, the first is of the layers that look at the whole text.
        after: What the next whole block follows.
        known: How many are whole and known.

    Attributes:
        blocks: Those of the first table, which are as many as the row's text needs. None if the row has gone.
        after: The number of the last part of the text that is known, or the root.
    """

    __slots__ = ("after", "blocks", "each", "known")

    def __init__(self, each: Sequence[BlockTable], after: Hashable = None, known: int = 0) -> None:
        self.each, self.after, self.known = tuple(each), after, known
        self.blocks = self.each[0].blocks


def table_of(*each: Sequence[int]) -> BlockTables:
    """Tables that begin with these."""
    return BlockTables([BlockTable(list(blocks), runs_of(blocks)) for blocks in each])
