"""Who has which blocks of the cache, and what whole blocks hold: a prompt that begins as another did shares its blocks.

A whole block is known by the tokens in it and by the block before it, so the same tokens after another beginning are another
block. Where layers with a window have tables of their own, their blocks are known by the first table's that holds the same
part of the text, and a beginning is shared as far as the blocks of the windows before its end are there. Blocks that no row has
any more stay known until their place is wanted; what was used the longest ago goes first, and the end of a text before its
beginning.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Final, NamedTuple

from zfabric.backends.hf_transformers.cache.block_table import BlockTable, BlockTables
from zfabric.backends.hf_transformers.cache.free_blocks import FreeBlocks, runs_of
from zfabric.backends.hf_transformers.cache.kv_layout import ONE_TABLE, KVLayout

#: What the first block of a text follows: adapter and salt, so that only texts of the same share blocks.
Root = Hashable
#: Of tables whose blocks become known to nobody.
_NEVER: Final = sys.maxsize
#: Of a block of the first table: what it follows, and its tokens. Of another: the number of the first one's, and which table.
_Key = tuple[Hashable, tuple[int, ...] | int]


class Shared(NamedTuple):
    """Known blocks that a text begins with.

    Attributes:
        whole: Of the first table.
        after: What the next block follows.
        each: Of each table. Beside a first one, others have only those that their windows reach, the last of so many.
    """

    whole: int
    after: Hashable
    each: tuple[list[int], ...]


class BlockPool:
    """Blocks of a cache.

    Args:
        size: How many there are.
        tokens: That each has room for.
        layout: Which tables a row has.

    Attributes:
        on_stored: Told of each block of first tables that becomes known: its number, what it follows, and its tokens.
        on_removed: Told of each of them that is forgotten.
    """

    def __init__(self, size: int, tokens: int, layout: KVLayout = ONE_TABLE) -> None:
        self.on_stored: Callable[[int, Hashable, tuple[int, ...]], None] | None = None
        self.on_removed: Callable[[int], None] | None = None
        self.size: Final = size
        self.tokens: Final = tokens
        self._windows: Final = layout.windows
        #: Of a row.
        self.tables: Final = len(layout.windows)
        #: Tables of each window.
        self._sliding: Final = {
            window: [table for table, its in enumerate(layout.windows) if its == window]
            for window in layout.windows
            if window is not None
        }
        self._spans: Final = layout.spans(tokens)
        self._free = FreeBlocks(size)
        #: How many rows have each block in use.
        self._users = [0] * size
        #: Known blocks that no row has, those used the longest ago first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        #: Of known blocks of first tables.
        self._number_of: dict[int, int] = {}
        self._numbers = count()

    @property
    def available(self) -> int:
        """Blocks that are free, or would be if what nobody has were forgotten. From any thread."""
        return len(self._free) + len(self._idle)

    @property
    def slides(self) -> bool:
        """Whether rows give blocks back as they go on."""
        return bool(self._sliding)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks of a table so many tokens take."""
        return -(-tokens // self.tokens)

    def find(self, tokens: Sequence[int], root: Root) -> Shared:
        """The known blocks that a text begins with. At least one of its tokens is left out: it has to be computed."""
        after: Hashable = (root,)
        found: list[int] = []
        for begin in range(0, len(tokens) - self.tokens, self.tokens):
            block = self._block_of.get((after, tuple(tokens[begin : begin + self.tokens])))
            if block is None:
                break
            found.append(block)
            after = self._number_of[block]
        if self.tables == 1:
            return Shared(len(found), after, (found,))
        numbers = [self._number_of[block] for block in found]
        whole = self._reached(numbers)
        after = numbers[whole - 1] if whole else (root,)
        others = (
            [self._block_of[number, table] for number in numbers[first:whole]]
            for table, first in enumerate(self._firsts(whole), 1)
        )
        return Shared(whole, after, (found[:whole], *others))

    def _reached(self, numbers: Sequence[int]) -> int:
        """How many of these blocks of a text can be shared: as many as their windows' blocks are there for."""
        whole = place = len(numbers)
        firsts = self._firsts(whole)
        while place > min(firsts):
            place -= 1
            number = numbers[place]
            missing = ((number, table) not in self._block_of for table in range(1, self.tables))
            if any(place >= first and lacks for first, lacks in zip(firsts, missing, strict=True)):
                whole, firsts = place, self._firsts(place)
        return whole

    def _firsts(self, count: int) -> list[int]:
        """Of each table but the first, the first block that is needed to go on after so many."""
        return [self._behind(table, count * self.tokens) for table in range(1, self.tables)]

    def _behind(self, table: int, tokens: int) -> int:
        """Blocks of a table that the next token after so many, and all after it, do not look at."""
        window = self._windows[table]
        return 0 if window is None else max(0, tokens + 1 - window) // self.tokens

    def idle(self, shared: Shared) -> int:
        """How many of these are available until somebody takes them, and goes on after them."""
        idle = 0
        for table, blocks in enumerate(shared.each):
            reached = shared.whole - self._behind(table, shared.whole * self.tokens)
            idle += sum(block in self._idle for block in blocks[len(blocks) - reached :])
        return idle

    def needed(self, shared: Shared, count: int) -> int:
        """Blocks that a row takes besides, which begins with these and has so many in its first table."""
        done = shared.whole * self.tokens
        return sum(self._most(table, self._behind(table, done), count) - shared.whole for table in range(self.tables))

    def _most(self, table: int, given_back: int, count: int) -> int:
        """The end of a table whose row has so many blocks in the first one."""
        span = self._spans[table]
        return count if span is None else min(count, given_back + span)

    def open(self, root: Root, shared: Shared | None = None) -> BlockTables:
        """Tables that begin with known blocks, for a row that goes on after them."""
        if shared is None or not shared.whole:
            return BlockTables([BlockTable() for _ in self._windows], (root,))
        each = []
        for blocks in shared.each:
            for block in blocks:
                self._use(block)
            before = shared.whole - len(blocks)
            # What lies behind a window is nobody's: any numbers do, and these are one run.
            numbers = [*range(before), *blocks]
            each.append(BlockTable(numbers, runs_of(numbers), before))
        tables = BlockTables(each, shared.after, shared.whole)
        self.give_back(tables, shared.whole * self.tokens)
        return tables

    def grow(self, tables: BlockTables, count: int) -> bool:
        """Give a row so many blocks in its first table, and what it needs in the others; nothing is given if there are not
        enough. A table with a window ends as far ahead of what was given back as its row may get in a pass."""
        if self.tables == 1 and count <= len(tables.blocks):
            return True
        ends = [self._most(index, table.given_back, count) for index, table in enumerate(tables.each)]
        missing = sum(max(0, end - len(table.blocks)) for end, table in zip(ends, tables.each, strict=True))
        if missing > self.available:
            return False
        while len(self._free) < missing:
            self._evict()
        if missing:
            for end, table in zip(ends, tables.each, strict=True):
                self._extend(table, end - len(table.blocks))
        return True

    def _extend(self, table: BlockTable, missing: int) -> None:
        """Give a table so many free blocks more, in as few runs as there can be."""
        while missing > 0:
            begin = table.blocks[-1] + 1 if table.blocks else 0
            taken = self._free.take_next(begin, missing) if table.blocks else 0
            if not taken:
                begin, taken = self._free.take(), 1
            table.extend(begin, begin + taken)
            self._users[begin : begin + taken] = [1] * taken
            missing -= taken

    def fork(self, tables: BlockTables, whole: int) -> BlockTables:
        """Other tables with the first so many blocks, which nobody writes to any more."""
        each = []
        for table in tables.each:
            for block in table.blocks[table.given_back : whole]:
                self._users[block] += 1
            each.append(BlockTable(table.blocks[:whole], runs_of(table.blocks[:whole]), table.given_back))
        return BlockTables(each, tables.after, tables.known)

    def learn(self, tables: BlockTables, tokens: Sequence[int]) -> None:
        """The blocks of a row that these tokens of it fill, from the first on, are whole."""
        while (tables.known + 1) * self.tokens <= len(tokens):
            start = tables.known * self.tokens
            key = (tables.after, tuple(tokens[start : start + self.tokens]))
            block = self._block_of.get(key)
            if block is None:
                block = tables.blocks[tables.known]
                self._block_of[key], self._key_of[block] = block, key
                self._number_of[block] = next(self._numbers)
                if self.on_stored is not None:
                    self.on_stored(self._number_of[block], *key)
            # If another row was first, what follows is known by its block.
            tables.after = number = self._number_of[block]
            for index in range(1, self.tables):
                beside = tables.each[index].blocks[tables.known]
                if self._block_of.setdefault((number, index), beside) == beside:
                    self._key_of[beside] = (number, index)
            tables.known += 1

    def give_back(self, tables: BlockTables, tokens: int) -> None:
        """A row has so many tokens, and goes on after them. Blocks that its windows do not reach any more are its no longer;
        those that are not known yet stay until they are."""
        for indexes in self._sliding.values():
            count = min(self._behind(indexes[0], tokens), tables.known)
            before = tables.each[indexes[0]].given_back
            if count > before:
                for index in indexes:
                    self._give(tables.each[index].blocks[before:count])
                    tables.each[index].given_back = count

    def close(self, tables: BlockTables) -> None:
        """A row has gone."""
        for table in tables.each:
            self._give(table.blocks[table.given_back :])
            table.clear()

    def _give(self, blocks: Sequence[int]) -> None:
        users, known, idle = self._users, self._key_of, self._idle
        freed: list[int] = []
        for block in reversed(blocks):
            left = users[block] = users[block] - 1
            if not left:
                if block in known:
                    idle[block] = None
                else:
                    freed.append(block)
        for begin, end in runs_of(freed[::-1]):
            self._free.give(begin, end)

    def forget(self) -> None:
        """Forget what blocks hold that nobody has."""
        while self._idle:
            self._evict()

    def renew(self, rows: Sequence[BlockTables]) -> None:
        """What blocks hold is of no use to anybody who comes: all is forgotten, and told to nobody.

        Args:
            rows: Those that there are. They go on, and what they come to hold becomes known to nobody either.
        """
        for block in self._idle:
            self._free.give(block, block + 1)
        for known in (self._idle, self._block_of, self._key_of, self._number_of):
            known.clear()
        for tables in rows:
            tables.known = _NEVER

    def _use(self, block: int) -> None:
        self._idle.pop(block, None)
        self._users[block] += 1

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        self._free.give(block, block + 1)
        del self._block_of[self._key_of.pop(block)]
        number = self._number_of.pop(block, None)
        if number is None:
            return
        if self.on_removed is not None:
            self.on_removed(number)
        # Blocks of other tables are found by this one alone.
        for table in range(1, self.tables):
            beside = self._block_of.pop((number, table), None)
            if beside is not None:
                del self._key_of[beside]
                if beside in self._idle:
                    del self._idle[beside]
                    self._free.give(beside, beside + 1)
