"""Which hosts have which blocks of prompts cached: a bounded table from a block's hash to its holders.

A hash covers its block and all before it, so a flat table is a trie whose edges are implied: whoever finds a block knows the
way to it. Look-ups follow a prompt from its first block and stop at the first one that nobody has.

Holders of a block are one integer, a bit for each holder, so that a thousand holders of a common system prompt cost sixteen
words and no walk. A holder that is gone gives its bit back at once, and blocks are rid of it when they are next touched: each
remembers the epoch of its last change, and a bit that was given out later is not meant.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from struct import unpack_from
from typing import Generic, TypeVar

from zfabric.limits import PREFIX_HASH_BYTES, PREFIX_INDEX_BLOCKS_MAX

H = TypeVar("H", bound=Hashable)


def hashes_of(prefix: bytes) -> tuple[int, ...]:
    """The hashes of a SUBMIT's `prefix`, the first block's first; what is left over at the end is ignored."""
    return unpack_from(f"<{len(prefix) // PREFIX_HASH_BYTES}Q", prefix)


class PrefixIndex(Generic[H]):
    """What holders have cached.

    Costs, with b blocks given and h holders known: `stored` and `removed` take O(b), `matched` O(blocks that match + holders
    found), `forget` O(1), and the first `stored` of a new holder O(h). An operation on one block moves h / 64 words.

    Args:
        blocks_max: Blocks that are known at once. Those that were stored longest ago go first, and of one prompt the last ones.

    Example:
        >>> index = PrefixIndex[str]()
        >>> index.stored("w1", [10, 11, 12])
        >>> index.stored("w2", [10])
        >>> index.matched([10, 11, 99])
        {'w2': 1, 'w1': 2}
    """

    __slots__ = ("_births", "_blocks", "_epoch", "_free", "_live", "_places", "_since", "_slots", "blocks_max")

    def __init__(self, blocks_max: int = PREFIX_INDEX_BLOCKS_MAX) -> None:
        self.blocks_max = blocks_max
        #: By hash: the bits of its holders, and the epoch in which they were right.
        self._blocks: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._places: dict[H, int] = {}
        self._slots: list[H | None] = []
        self._free: list[int] = []
        self._live = 0
        self._epoch = 0
        #: By place, in the order in which they were last given out: (epoch, place); and the bits of each and all later ones.
        self._births: dict[int, int] = {}
        self._since: tuple[list[int], list[int]] = ([], [0])

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def holders(self) -> int:
        """How many holders have blocks stored."""
        return len(self._places)

    def matched(self, hashes: Sequence[int]) -> dict[H, int]:
        """By holder, how many of a prompt's first blocks it has without a gap; who lacks the first is left out."""
        found: dict[H, int] = {}
        blocks = self._blocks
        having = self._live
        count = 0
        for count, block in enumerate(hashes):
            held = blocks.get(block)
            holders = having & self._meant(held) if held is not None else 0
            if holders != having:
                if count:
                    self._note(found, having & ~holders, count)
                having = holders
                if not having:
                    return found
        if hashes:
            self._note(found, having, count + 1)
        return found

    def stored(self, holder: H, hashes: Sequence[int]) -> None:
        """A holder has these blocks of one prompt now, in the prompt's order."""
        if not hashes:
            return
        bit = 1 << self._place(holder)
        blocks, epoch = self._blocks, self._epoch
        before: tuple[int, int] | None = None
        after = (bit, epoch)
        # From the last to the first: the first block is the youngest, and never goes before what follows it.
        for block in reversed(hashes):
            held = blocks.get(block)
            if held is not before:
                # Blocks of one prompt mostly have the same holders, and then share one value.
                before = held
                after = (bit if held is None else self._meant(held) | bit, epoch)
            blocks[block] = after
            blocks.move_to_end(block)
        while len(blocks) > self.blocks_max:
            blocks.popitem(last=False)

    def removed(self, holder: H, hashes: Sequence[int]) -> None:
        """A holder has these blocks no more; unknown ones are ignored."""
        place = self._places.get(holder)
        if place is None:
            return
        for block in hashes:
            held = self._blocks.get(block)
            if held is None:
                continue
            left = self._meant(held) & ~(1 << place)
            if left:
                self._blocks[block] = (left, self._epoch)
            else:
                del self._blocks[block]

    def forget(self, holder: H) -> None:
        """A holder has nothing any more: it is gone, or has cleared its cache."""
        place = self._places.pop(holder, None)
        if place is not None:
            self._slots[place] = None
            self._free.append(place)
            self._live &= ~(1 << place)

    def _meant(self, held: tuple[int, int]) -> int:
        """The holders of a block that are still the ones that stored it."""
        bits, epoch = held
        if epoch == self._epoch:
            return bits & self._live
        epochs, later = self._since
        return bits & self._live & ~later[bisect_right(epochs, epoch)]

    def _place(self, holder: H) -> int:
        """The place of a holder's bit, given out if it has none."""
        place = self._places.get(holder)
        if place is not None:
            return place
        if self._free:
            place = self._free.pop()
            self._slots[place] = holder
        else:
            place = len(self._slots)
            self._slots.append(holder)
        self._places[holder] = place
        self._live |= 1 << place
        self._epoch += 1
        self._births.pop(place, None)
        self._births[place] = self._epoch
        later = [0]
        for given in reversed(self._births):
            later.append(later[-1] | 1 << given)
        later.reverse()
        self._since = (list(self._births.values()), later)
        return place

    def _note(self, found: dict[H, int], bits: int, count: int) -> None:
        for place in _places_of(bits):
            holder = self._slots[place]
            assert holder is not None
            found[holder] = count


def _places_of(bits: int) -> Iterator[int]:
    # A search in its digits costs less than arithmetic on an integer of a thousand bits for each one that is set.
    digits = f"{bits:b}"
    at = digits.find("1")
    while at >= 0:
        yield len(digits) - 1 - at
        at = digits.find("1", at + 1)
