"""What workers of a cell tell of their caches, told on to the parent: a block is cached in the cell while any of them has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from zfabric.core.controller.hosting import Hosting
from zfabric.core.controller.placement import Placement
from zfabric.core.worker.cached import CacheChange, CacheReports
from zfabric.limits import CELL_SWEPT_BLOCKS, PREFIX_HASH_BYTES
from zfabric.wire.load import CachedBlocks


class CellCaches:
    """Takes what workers tell, after the controller's index has taken it.

    A worker that goes, or clears its cache, does not say what it had. Then all that was told on of the model is looked at again,
    a part in each look: what nobody has any more is told as gone.

    Args:
        placement: What the controller knows of caches; this is told from now on.
        told: What was told on, as the session keeps it.
        tell: Takes what is to be told on.
    """

    def __init__(self, placement: Placement, told: CacheReports, tell: Callable[[CacheChange], None]) -> None:
        self._placement: Final = placement
        self._told_on: Final = told
        self._tell: Final = tell
        self._units: dict[str, int] = {}
        #: By model, what is still to be looked at.
        self._doubtful: dict[str, list[bytes]] = {}
        placement.told_on = self

    @property
    def due(self) -> bool:
        """Whether something is to be looked at."""
        return bool(self._doubtful)

    def told(self, host: Hosting, change: CachedBlocks) -> None:
        """A worker's cache changed."""
        model = host.model.name
        self._units[model] = max(self._units.get(model, 0), change.unit)
        if change.whole:
            self.lost(host)
        gone = [block for block in _blocks(change.removed) if not self._placement.holds(model, block)]
        self._tell(CacheChange(model, _blocks(change.stored), gone, self._units[model]))

    def lost(self, host: Hosting) -> None:
        """A worker that has told is gone, or has nothing any more."""
        self._doubtful[host.model.name] = self._told_on.blocks(host.model.name)

    def sweep(self) -> None:
        """Look at some of what may be gone. Costs O(CELL_SWEPT_BLOCKS)."""
        model = next(iter(self._doubtful), None)
        if model is None:
            return
        blocks = self._doubtful[model]
        looked, self._doubtful[model] = blocks[:CELL_SWEPT_BLOCKS], blocks[CELL_SWEPT_BLOCKS:]
        gone = [block for block in looked if not self._placement.holds(model, block)]
        if gone:
            self._tell(CacheChange(model, [], gone, self._units.get(model, 0)))
        if not self._doubtful[model]:
            del self._doubtful[model]


def _blocks(joined: bytes) -> list[bytes]:
    return [joined[at : at + PREFIX_HASH_BYTES] for at in range(0, len(joined), PREFIX_HASH_BYTES)]
