"""Which layers share blocks: those that look at the whole text, and those with a window, have tables of their own.

Layers with a window need no block behind it, whatever other layers of the model look at. All blocks are alike, so that any of
them can be any table's, and nothing has to be divided beforehand: a block holds the keys and values of some tokens for as
many layers as are in the smallest group, and a group with more of them has several tables. Short texts take as much as they
would if all layers shared one table, and long ones what their windows leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

#: A row's tables cost the host time in every step, so there are no more than so many: Gemma 3 has seven.
_TABLES_MAX: Final = 8
#: At most so much of a group's room may be left empty, as a part of what its layers fill.
_WASTE_MAX: Final = 1 / 8


@dataclass(frozen=True)
class KVLayout:
    """How layers share blocks.

    Attributes:
        windows: Of each table: tokens that its layers see, the newest included; None for all. If there are several tables, the
            first has none.
        slots: Layers that a block has room for.
        layers: Of the model, in the same measure: if all share one table, that is one block's worth.
        places: Table and slot of each layer; empty if there is one table, in which each layer has a slot of its own.
        ahead: Tokens that a row may get in a pass.
        kept_because: Why blocks behind windows are kept, where some layers have one.
    """

    windows: tuple[int | None, ...] = (None,)
    slots: int = 1
    layers: int = 1
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    ahead: int = 0
    kept_because: str | None = None

    def spans(self, tokens: int) -> list[int | None]:
        """Blocks of so many tokens that each table has at once at most; None where that is its whole text. A window may begin,
        and what is ahead end, within one."""
        return [None if window is None else -(-(window + self.ahead) // tokens) + 1 for window in self.windows]

    def taken(self, length: int, tokens: int) -> int:
        """Blocks that a row of this length has when it is stepped."""
        whole = -(-length // tokens)
        return sum(whole if window is None else min(whole, -(-window // tokens) + 1) for window in self.windows)

    def longest(self, wished: int, blocks: int, tokens: int) -> int:
        """Tokens of the longest row that so many blocks have room for, if that is less than is wished."""
        spans = self.spans(tokens)
        low, high = 0, -(-wished // tokens)
        while low < high:
            middle = (low + high + 1) // 2
            if sum(middle if span is None else min(middle, span) for span in spans) <= blocks:
                low = middle
            else:
                high = middle - 1
        return min(wished, low * tokens)

    def cells(self, blocks: int, tokens: int) -> int:
        """Tokens whose keys and values, of all layers, take as much as so many blocks of so many tokens."""
        return blocks * tokens * self.slots // self.layers

    def blocks(self, cells: int, tokens: int) -> int:
        """The other way round, rounded up."""
        return -(-cells * self.layers // (self.slots * tokens))


#: All layers share one table.
ONE_TABLE: Final = KVLayout()


def layout_of(windows: Mapping[int, int | None], context_length: int, *, ahead: int, alike: bool) -> KVLayout:
    """How layers share blocks best.

    Args:
        windows: Of each layer.
        context_length: No text is longer.
        ahead: Tokens that a row may get in a pass.
        alike: Whether a token takes as much in each layer, in the same shape.
    """
    groups: dict[int | None, list[int]] = {}
    for layer, window in sorted(windows.items()):
        # Where texts are no longer than a window, it hides nothing.
        groups.setdefault(None if window is not None and window >= context_length else window, []).append(layer)
    if None not in groups:
        # All give back what the widest leaves; a beginning is then known as a whole.
        return KVLayout((max(filter(None, groups), default=None),), ahead=ahead)
    if len(groups) == 1:
        return KVLayout()
    if not alike:
        return KVLayout(kept_because="keys and values of its layers differ in shape")
    order = sorted(groups, key=lambda window: (window is not None, window))
    slots = _slots([len(its) for its in groups.values()])
    found = _layout({window: groups[window] for window in order}, slots)
    if len(found.windows) > _TABLES_MAX:
        return KVLayout(kept_because=f"its groups of layers need {len(found.windows)} tables, more than {_TABLES_MAX}")
    return replace(found, ahead=ahead)


def _layout(groups: Mapping[int | None, list[int]], slots: int) -> KVLayout:
    windows: list[int | None] = []
    places: dict[int, tuple[int, int]] = {}
    for window, layers in groups.items():
        places |= {layer: (len(windows) + index // slots, index % slots) for index, layer in enumerate(layers)}
        windows += [window] * -(-len(layers) // slots)
    return KVLayout(tuple(windows), slots, len(places), places)


def _slots(sizes: Iterable[int]) -> int:
    """Layers of a block that make few tables of groups of these sizes, and leave little room empty."""
    sizes = list(sizes)

    def tables(slots: int) -> list[int]:
        return [-(-size // slots) for size in sizes]

    fitting = (
        slots
        for slots in range(1, max(sizes) + 1)
        if all(its * slots <= size * (1 + _WASTE_MAX) for its, size in zip(tables(slots), sizes, strict=True))
    )
    return min(fitting, key=lambda slots: (sum(tables(slots)), slots))
