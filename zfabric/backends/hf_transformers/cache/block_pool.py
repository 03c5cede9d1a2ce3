"""Who has which blocks of the cache, and what whole blocks hold: a prompt that begins as another did shares its blocks.

A whole block is known by the tokens in it and by the block before it, so the same tokens after another beginning are another
block. Blocks that no row has any more stay known until their place is wanted; what was used the longest ago goes first, and
the end of a text before its beginning.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from zfabric.backends.hf_transformers.cache.free_blocks import FreeBlocks, runs_of

#: What the first block of a text follows: adapter and salt, so that only texts of the same share blocks.
Root = Hashable
#: Of a table whose blocks become known to nobody.
_NEVER: Final = sys.maxsize
_Key = tuple[Hashable, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one row.

    Attributes:
        blocks: In the order of the row's tokens.
        runs: Stretches of them that lie side by side, as begins and ends.
        after: What the next whole block follows: the number of the last one that is known, or the root.
        known: How many of them are whole and known.
        given_back: How many of the first ones the row has no more; their numbers stay, and may be another's.
    """

    after: Hashable
    blocks: list[int] = field(default_factory=list)
    known: int = 0
    runs: list[list[int]] = field(default_factory=list)
    given_back: int = 0

    def append(self, block: int) -> None:
        """One more."""
        self.blocks.append(block)
        runs = self.runs
        if runs and runs[-1][1] == block:
            runs[-1][1] = block + 1
        else:
            runs.append([block, block + 1])


def table_of(blocks: Sequence[int], after: Hashable = None, known: int = 0) -> BlockTable:
    """A table that begins with these."""
    return BlockTable(after, list(blocks), known, runs_of(blocks))


class BlockPool:
    """Blocks of a cache.

    Args:
        size: How many there are.
        tokens: That each has room for.

    Attributes:
        on_stored: Told of each block that becomes known: its number, what it follows, and its tokens.
        on_removed: Told of each that is forgotten.
    """

    def __init__(self, size: int, tokens: int) -> None:
        self.on_stored: Callable[[int, Hashable, tuple[int, ...]], None] | None = None
        self.on_removed: Callable[[int], None] | None = None
        self.size: Final = size
        self.tokens: Final = tokens
        self._free = FreeBlocks(size)
        #: Rows that have each block in use.
        self._users: dict[int, int] = {}
        #: Known blocks that no row has, those used the longest ago first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._number_of: dict[int, int] = {}
        self._numbers = count()

    @property
    def available(self) -> int:
        """Blocks that are free, or would be if what nobody has were forgotten. From any thread."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // self.tokens)

    def find(self, tokens: Sequence[int], root: Root) -> list[int]:
        """The known blocks that a text begins with. At least one of its tokens is left out: it has to be computed."""
        after: Hashable = (root,)
        found: list[int] = []
        for begin in range(0, len(tokens) - self.tokens, self.tokens):
            block = self._block_of.get((after, tuple(tokens[begin : begin + self.tokens])))
            if block is None:
                break
            found.append(block)
            after = self._number_of[block]
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these are available until somebody takes them."""
        return sum(block in self._idle for block in blocks)

    def open(self, root: Root, shared: Sequence[int] = ()) -> BlockTable:
        """A table that begins with known blocks."""
        for block in shared:
            self._use(block)
        after: Hashable = self._number_of[shared[-1]] if shared else (root,)
        return table_of(shared, after, len(shared))

    def grow(self, table: BlockTable, count: int) -> bool:
        """Give a table so many blocks in all; nothing is given if there are not enough."""
        missing = count - len(table.blocks)
        if missing > self.available:
            return False
        for _ in range(missing):
            table.append(self._take(table.blocks[-1] if table.blocks else None))
        return True

    def fork(self, table: BlockTable, whole: int) -> BlockTable:
        """Another table with the first so many blocks, which nobody writes to any more."""
        for block in table.blocks[table.given_back : whole]:
            self._users[block] += 1
        other = table_of(table.blocks[:whole], table.after, table.known)
        other.given_back = table.given_back
        return other

    def learn(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """The blocks of a table that these tokens of its row fill, from the first on, are whole."""
        while (table.known + 1) * self.tokens <= len(tokens):
            start = table.known * self.tokens
            key = (table.after, tuple(tokens[start : start + self.tokens]))
            block = self._block_of.get(key)
            if block is None:
                block = table.blocks[table.known]
                self._block_of[key], self._key_of[block] = block, key
                self._number_of[block] = next(self._numbers)
                if self.on_stored is not None:
                    self.on_stored(self._number_of[block], *key)
            # If another row was first, what follows is known by its block.
            table.after = self._number_of[block]
            table.known += 1

    def give_back(self, table: BlockTable, count: int) -> None:
        """A row reads its first so many blocks no more. Those that are not known yet stay until they are."""
        count = min(count, table.known)
        if count > table.given_back:
            self._give(table.blocks[table.given_back : count])
            table.given_back = count

    def close(self, table: BlockTable) -> None:
        """A row has gone."""
        self._give(table.blocks[table.given_back :])
        table.blocks.clear()
        table.runs.clear()

    def _give(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.give(block)

    def forget(self) -> None:
        """Forget what blocks hold that nobody has."""
        while self._idle:
            self._evict()

    def renew(self, tables: Sequence[BlockTable]) -> None:
        """What blocks hold is of no use to anybody who comes: all is forgotten, and told to nobody.

        Args:
            tables: Of the rows that there are. They go on, and what they come to hold becomes known to nobody either.
        """
        for block in self._idle:
            self._free.give(block)
        for known in (self._idle, self._block_of, self._key_of, self._number_of):
            known.clear()
        for table in tables:
            table.known = _NEVER

    def _use(self, block: int) -> None:
        self._idle.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1

    def _take(self, last: int | None) -> int:
        if not len(self._free):
            self._evict()
        grown = last is not None and self._free.take_next(last + 1)
        block = last + 1 if grown and last is not None else self._free.take()
        self._users[block] = 1
        return block

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        number = self._number_of.pop(block)
        if self.on_removed is not None:
            self.on_removed(number)
        self._free.give(block)
