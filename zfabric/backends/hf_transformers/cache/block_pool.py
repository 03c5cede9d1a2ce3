"""Who has which blocks of the cache, and what whole blocks hold: a prompt that begins as another did shares its blocks.

The same tokens after another beginning are another block. Where layers with a window have tables of their own, a beginning is
shared as far as the blocks of the windows before its end are there. Blocks that no row has any more stay known until their
place is wanted; what was used the longest ago goes first, and the end of a text before its beginning. Whatever is done with the
blocks of a row is done by runs that lie side by side, so that coming and going cost little beside a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Final, NamedTuple

from zfabric.backends.hf_transformers.cache.block_table import BlockTable, BlockTables
from zfabric.backends.hf_transformers.cache.free_blocks import FreeBlocks, runs_of
from zfabric.backends.hf_transformers.cache.idle_blocks import IdleBlocks
from zfabric.backends.hf_transformers.cache.known_blocks import KnownBlocks
from zfabric.backends.hf_transformers.cache.kv_layout import ONE_TABLE, KVLayout

#: What the first block of a text follows: adapter and salt, so that only texts of the same share blocks.
Root = Hashable
#: Of tables whose blocks become known to nobody.
_NEVER: Final = sys.maxsize


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
        self.on_stored: Callable[[int, Hashable, Sequence[int]], None] | None = None
        self.on_removed: Callable[[int], None] | None = None
        self.size: Final = size
        self.tokens: Final = tokens
        self._windows: Final = layout.windows
        #: Of a row.
        self.tables: Final = len(layout.windows)
        self._plain: Final = layout.windows == (None,)
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
        self._idle = IdleBlocks(size)
        self._known = KnownBlocks(size, tokens, self.tables)

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
            block = self._known.find(self._known.key(after, tokens[begin : begin + self.tokens]))
            if block is None:
                break
            found.append(block)
            after = self._known.number(block)
        if self.tables == 1:
            return Shared(len(found), after, (found,))
        numbers = [self._known.number(block) for block in found]
        whole = self._reached(numbers)
        after = numbers[whole - 1] if whole else (root,)
        others = (
            [self._known.beside(number, table) for number in numbers[first:whole]]
            for table, first in enumerate(self._firsts(whole), 1)
        )
        return Shared(whole, after, (found[:whole], *([one for one in its if one is not None] for its in others)))

    def _reached(self, numbers: Sequence[int]) -> int:
        """How many of these blocks of a text can be shared: as many as their windows' blocks are there for."""
        whole = place = len(numbers)
        firsts = self._firsts(whole)
        while place > min(firsts):
            place -= 1
            number = numbers[place]
            missing = (self._known.beside(number, table) is None for table in range(1, self.tables))
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

    def taken(self, shared: Shared, count: int) -> int:
        """How many that are available a row takes, which begins with these and has so many in its first table."""
        if self._plain and not shared.whole:
            return count
        if not shared.whole:
            return sum([self._most(table, 0, count) for table in range(self.tables)])
        done = shared.whole * self.tokens
        taken = 0
        for table, blocks in enumerate(shared.each):
            behind = self._behind(table, done)
            reached = blocks[len(blocks) - shared.whole + behind :]
            taken += self._idle.count(reached) + self._most(table, behind, count) - shared.whole
        return taken

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
            self._use(blocks)
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
        if self._plain:
            missing = [count - len(tables.blocks)]
        else:
            ends = [self._most(index, table.given_back, count) for index, table in enumerate(tables.each)]
            missing = [max(0, end - len(table.blocks)) for end, table in zip(ends, tables.each, strict=True)]
        if sum(missing) > self.available:
            return False
        for table, more in zip(tables.each, missing, strict=True):
            if more:
                self._extend(table, more)
        return True

    def _extend(self, table: BlockTable, missing: int) -> None:
        """Give a table so many available blocks more, in as few runs as there can be: those behind its own, what is free, and
        what nobody has."""
        while missing > 0:
            begin = table.blocks[-1] + 1 if table.blocks else 0
            taken = self._free.take_next(begin, missing) if table.blocks else 0
            if not taken:
                begin, taken = self._free.take(missing) if len(self._free) else self._evicted(missing)
            table.extend(begin, begin + taken)
            self._users[begin : begin + taken] = [1] * taken
            missing -= taken

    def fork(self, tables: BlockTables, whole: int) -> BlockTables:
        """Other tables with the first so many blocks, which nobody writes to any more."""
        each = []
        for table in tables.each:
            self._use(table.blocks[table.given_back : whole])
            each.append(BlockTable(table.blocks[:whole], runs_of(table.blocks[:whole]), table.given_back))
        return BlockTables(each, tables.after, tables.known)

    def learn(self, tables: BlockTables, tokens: Sequence[int]) -> None:
        """The blocks of a row that these tokens of it fill, from the first on, are whole."""
        while (tables.known + 1) * self.tokens <= len(tokens):
            start = tables.known * self.tokens
            its = tokens[start : start + self.tokens]
            key = self._known.key(tables.after, its)
            first = self._known.find(key)
            if first is None:
                number = self._known.add(tables.blocks[tables.known], key)
                if self.on_stored is not None:
                    self.on_stored(number, tables.after, its)
            else:
                # Another row was first: what follows is known by its block.
                number = self._known.number(first)
            tables.after = number
            for index in range(1, self.tables):
                self._known.add_beside(tables.each[index].blocks[tables.known], number, index)
            tables.known += 1

    def give_back(self, tables: BlockTables, tokens: int) -> None:
        """A row has so many tokens, and goes on after them. Blocks that its windows do not reach any more are its no longer;
        those that are not known yet stay until they are."""
        for indexes in self._sliding.values():
            count = min(self._behind(indexes[0], tokens), tables.known)
            before = tables.each[indexes[0]].given_back
            if count > before:
                for index in indexes:
                    self._give(runs_of(tables.each[index].blocks[before:count]))
                    tables.each[index].given_back = count

    def close(self, tables: BlockTables) -> None:
        """A row has gone."""
        for table in tables.each:
            self._give(runs_of(table.blocks[table.given_back :]) if table.given_back else table.runs)
            table.clear()

    def _give(self, runs: Sequence[Sequence[int]]) -> None:
        """A row has these no more."""
        for begin, end in reversed(runs):
            users = self._users[begin:end]
            self._users[begin:end] = [count - 1 for count in users]
            if users.count(1) == len(users):
                self._left(begin, end)
                continue
            for first, after in reversed(runs_of([begin + place for place, count in enumerate(users) if count == 1])):
                self._left(first, after)

    def _left(self, begin: int, end: int) -> None:
        """Nobody has these: what is known stays so until its place is wanted."""
        flags = self._known.flags(begin, end)
        after = len(flags)
        while after:
            known = flags[after - 1]
            first = flags.rfind(1 - known, 0, after) + 1
            (self._idle.add if known else self._free.give)(begin + first, begin + after)
            after = first

    def forget(self) -> None:
        """Forget what blocks hold that nobody has."""
        while self._idle:
            begin, count = self._evicted(len(self._idle))
            self._free.give(begin, begin + count)

    def renew(self, rows: Sequence[BlockTables]) -> None:
        """What blocks hold is of no use to anybody who comes: all is forgotten, and told to nobody.

        Args:
            rows: Those that there are. They go on, and what they come to hold becomes known to nobody either.
        """
        while self._idle:
            self._free.give(*self._idle.pop(len(self._idle)))
        self._known.clear()
        for tables in rows:
            tables.known = _NEVER

    def _use(self, blocks: Sequence[int]) -> None:
        for begin, end in runs_of(blocks):
            self._idle.remove(begin, end)
            self._users[begin:end] = [count + 1 for count in self._users[begin:end]]

    def _evicted(self, most: int) -> tuple[int, int]:
        """Blocks on end that nobody had and that are forgotten, so many at most: the first, and how many."""
        begin, end = self._idle.pop(most)
        if self.tables == 1 and self.on_removed is None:
            self._known.forget(begin, end)
            return begin, end - begin
        numbers = self._known.numbers(begin, end)
        self._known.forget(begin, end)
        if self.on_removed is not None:
            for number in numbers:
                self.on_removed(number)
        self._forget_beside(numbers)
        return begin, end - begin

    def _forget_beside(self, numbers: Sequence[int]) -> None:
        for number in numbers if self.tables > 1 else ():
            for block in self._known.forget_beside(number):
                if self._idle.count([block]):
                    self._idle.remove(block, block + 1)
                    self._free.give(block, block + 1)
