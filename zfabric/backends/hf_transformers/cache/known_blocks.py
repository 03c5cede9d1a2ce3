"""What whole blocks hold: each is known by its tokens and by the block before it.

Where layers with a window have tables of their own, their blocks are known by the first table's that holds the same part of
the text.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Hashable, Sequence
from itertools import count
from typing import Final

#: Of a block of the first table: the number of the one before it and its tokens, packed; with its root, if it is the first of a
#: text. Of another table's: the number of the first table's, and which table.
Key = bytes | tuple[Hashable, bytes] | tuple[int, int]
#: Of blocks of other tables.
_NO_NUMBER: Final = -1


class KnownBlocks:
    """Known blocks.

    Args:
        size: Of all blocks; none is known at first.
        tokens: In each.
        tables: Of a row.
    """

    def __init__(self, size: int, tokens: int, tables: int) -> None:
        self._size, self._others = size, range(1, tables)
        # One object for each block, which keeps its own hash: with tuples of tokens a known block took 970 bytes instead of 177.
        self._pack: Final = struct.Struct(f"q{tokens}i").pack
        self._numbers = count()
        self.clear()

    def clear(self) -> None:
        """None is known any more."""
        self._block_of: dict[Key, int] = {}
        self._key_of: list[Key | None] = [None] * self._size
        self._flags = bytearray(self._size)
        self._number_of = array("q", [_NO_NUMBER]) * self._size

    def flags(self, begin: int, end: int) -> bytearray:
        """Of each block, 1 if it is known, else 0."""
        return self._flags[begin:end]

    def number(self, block: int) -> int:
        """Of a known block of a first table: what the next one follows."""
        return self._number_of[block]

    def key(self, after: Hashable, tokens: Sequence[int]) -> Key:
        """Of a block of a first table that holds these after that."""
        return self._pack(after, *tokens) if isinstance(after, int) else (after, self._pack(0, *tokens))

    def find(self, key: Key) -> int | None:
        """The block that is known by it."""
        block = self._block_of.get(key)
        return block if block is not None and self._flags[block] else None

    def add(self, block: int, key: Key) -> int:
        """This one of a first table is known by it. Returns its number."""
        self._enter(block, key)
        self._number_of[block] = number = next(self._numbers)
        return number

    def beside(self, number: int, table: int) -> int | None:
        """Another table's block of the same part of a text."""
        return self.find((number, table))

    def add_beside(self, block: int, number: int, table: int) -> None:
        """This one of another table holds what the one with that number does, unless another is known for it."""
        if self.beside(number, table) is None:
            self._enter(block, (number, table))
            self._number_of[block] = _NO_NUMBER

    def numbers(self, begin: int, end: int) -> list[int]:
        """Of those of these known blocks that are of first tables, the last first."""
        return [number for number in reversed(self._number_of[begin:end]) if number != _NO_NUMBER]

    def forget(self, begin: int, end: int) -> None:
        """These are not known any more."""
        # Their keys stay until they hold something else, so that who waits for the room does not wait for that.
        self._flags[begin:end] = bytes(end - begin)

    def forget_beside(self, number: int) -> list[int]:
        """Blocks of other tables are found by the first one's alone: these of a number are not known any more."""
        blocks = [self.beside(number, table) for table in self._others]
        found = [block for block in blocks if block is not None]
        for block in found:
            self.forget(block, block + 1)
        return found

    def _enter(self, block: int, key: Key) -> None:
        held = self._key_of[block]
        if held is not None and self._block_of.get(held) == block:
            del self._block_of[held]
        self._block_of[key], self._key_of[block], self._flags[block] = block, key, 1
