"""What the controller is told of the engines' caches: changes as they come, and all that is known when a session begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from zfabric.limits import PREFIX_KEPT_BLOCKS_MAX, PREFIX_TOLD_BLOCKS
from zfabric.wire.load import CachedBlocks


class CacheChange(NamedTuple):
    """What became of one model's cache: see `StepSink.cache_changed_threadsafe`."""

    model: str
    stored: Sequence[bytes]
    removed: Sequence[bytes]
    unit: int
    cleared: bool = False


class _Cache:
    """Of one model: what it has, and what of that is still to be told."""

    __slots__ = ("gone", "has", "new", "unit", "whole")

    def __init__(self) -> None:
        self.unit = 0
        self.has: dict[bytes, None] = {}
        self.new: dict[bytes, None] = {}
        self.gone: dict[bytes, None] = {}
        self.whole = True

    @property
    def due(self) -> bool:
        return bool(self.whole or self.new or self.gone)

    def tell_all(self) -> None:
        """As if nothing had been told yet."""
        self.whole, self.new, self.gone = True, dict(self.has), {}


class CacheReports:
    """Collects changes of caches by model, until they are told.

    A block that comes and goes between two reports is told as it is in the end. Of each model the blocks that were cached
    last are known, PREFIX_KEPT_BLOCKS_MAX at most: those before them are told as gone, which costs a hit and misleads nobody.

    Example:
        >>> reports = CacheReports()
        >>> reports.changed(CacheChange("m", [b"12345678"], [], unit=16))
        >>> [(item.model, len(item.stored), item.whole) for item in reports.take()]
        [('m', 8, True)]
    """

    __slots__ = ("_caches",)

    def __init__(self) -> None:
        self._caches: dict[str, _Cache] = {}

    @property
    def due(self) -> bool:
        """Whether there is something to tell."""
        return any(cache.due for cache in self._caches.values())

    def changed(self, change: CacheChange) -> None:
        """An engine's cache changed."""
        cache = self._caches.get(change.model)
        if cache is None or change.cleared:
            cache = self._caches[change.model] = _Cache()
        cache.unit = change.unit
        for block in change.removed:
            self._remove(cache, block)
        for block in change.stored:
            # Again at the end: what was cached last is kept longest.
            if cache.has.pop(block, cache) is cache:
                cache.gone.pop(block, None)
                cache.new[block] = None
            cache.has[block] = None
        while len(cache.has) > PREFIX_KEPT_BLOCKS_MAX:
            self._remove(cache, next(iter(cache.has)))

    def again(self) -> None:
        """A session has begun, whose controller knows nothing: all is to be told."""
        for cache in self._caches.values():
            cache.tell_all()

    def forget(self, models: Iterable[str]) -> None:
        """Only these models are served any more."""
        kept = set(models)
        self._caches = {model: cache for model, cache in self._caches.items() if model in kept}

    def blocks(self, model: str) -> list[bytes]:
        """What is cached of a model's prompts, as far as is known here, the longest cached first."""
        cache = self._caches.get(model)
        return [] if cache is None else list(cache.has)

    def take(self) -> list[CachedBlocks]:
        """What is to be told next: one report's worth, after which more may be `due`."""
        room = PREFIX_TOLD_BLOCKS
        told = []
        for model, cache in self._caches.items():
            if not cache.due or not room:
                continue
            gone = _first(cache.gone, room)
            new = _first(cache.new, room - len(gone))
            room -= len(gone) + len(new)
            told.append(
                CachedBlocks(
                    model=model, stored=b"".join(new), removed=b"".join(gone), whole=cache.whole, unit=cache.unit
                )
            )
            cache.whole = False
        return told

    @staticmethod
    def _remove(cache: _Cache, block: bytes) -> None:
        if cache.has.pop(block, cache) is not cache:
            # What was never told as stored may be what dispatches have the controller believe, so it is told all the same.
            cache.new.pop(block, None)
            cache.gone[block] = None
            if len(cache.gone) > PREFIX_KEPT_BLOCKS_MAX:
                cache.tell_all()


def _first(blocks: dict[bytes, None], count: int) -> list[bytes]:
    """Take out the first so many."""
    taken = [block for block, _ in zip(blocks, range(count), strict=False)]
    for block in taken:
        del blocks[block]
    return taken
