"""Where prompts are cached, as far as the controller knows, and what dispatches made of it.

It is learnt from dispatches: a worker that was given a prompt has its blocks. That is a guess: an engine may have thrown blocks
away since, or may not share prefixes at all. Some engines tell what they have of prompts that came as tokens. Requests whose
SUBMIT brings no hashes are not looked at and cost nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from zfabric.core.controller.candidates import Host
from zfabric.core.controller.hosting import Hosting, Model
from zfabric.core.controller.prefixes import PrefixIndex, hashes_of
from zfabric.wire.load import CachedBlocks


class PrefixFigures:
    """What dispatches found cached, of requests with hashes, under one policy.

    Attributes:
        dispatches: Attempts with hashes that went to a worker.
        hits: Those whose worker had their first block at least.
        tokens: Tokens of all blocks that had hashes.
        hit_tokens: Those that the chosen worker had cached.
        regret_tokens: Those that another host of the model had cached beyond what the chosen one had.
    """

    __slots__ = ("dispatches", "hit_tokens", "hits", "regret_tokens", "tokens")

    def __init__(self) -> None:
        self.dispatches = self.hits = self.tokens = self.hit_tokens = self.regret_tokens = 0


class ToldOn(Protocol):
    """Who passes on what workers tell of their caches."""

    def told(self, host: Hosting, change: CachedBlocks) -> None:
        """A host's cache changed, and the index with it."""

    def lost(self, host: Hosting) -> None:
        """A host that has told is gone, and the index has forgotten it."""


class Placement:
    """The index of all hosts, and the figures of dispatches by policy.

    Attributes:
        index: What each host has cached.
        figures: By policy.
        told_on: Who passes on what workers tell; None for nobody.
    """

    __slots__ = ("_found", "_model", "_prefix", "_units", "figures", "index", "told_on")

    def __init__(self) -> None:
        self.index: PrefixIndex[Hosting] = PrefixIndex()
        self.figures: dict[str, PrefixFigures] = {}
        self.told_on: ToldOn | None = None
        #: Tokens that are cached at once, of hosts that tell what they have cached.
        self._units: dict[Hosting, int] = {}
        self._prefix: bytes | None = None
        self._model: Model | None = None
        self._found: dict[Host, int] = {}

    def matched(self, model: Model, prefix: bytes) -> Mapping[Host, int]:
        """By host of a model, how many of a prompt's first blocks are cached there. A policy's look-up serves its dispatch."""
        if prefix is not self._prefix or model is not self._model:
            found = self.index.matched(hashes_of(prefix))
            self._found = {host: count for host, count in found.items() if host.model is model}
            self._prefix, self._model = prefix, model
        return self._found

    def placed(self, host: Hosting, prefix: bytes, block_size: int, policy: str) -> None:
        """An attempt goes to a host."""
        hashes = hashes_of(prefix)
        if not hashes:
            return
        found = self.matched(host.model, prefix)
        hit, best = found.get(host, 0), max(found.values(), default=0)
        figures = self.figures.get(policy)
        if figures is None:
            figures = self.figures[policy] = PrefixFigures()
        figures.dispatches += 1
        figures.hits += hit > 0
        figures.tokens += len(hashes) * block_size
        figures.hit_tokens += hit * block_size
        figures.regret_tokens += (best - hit) * block_size
        self._changed()
        unit = self._units.get(host, 0)
        if unit > block_size:
            # An engine that caches more tokens at once has nothing of the rest, and would never tell of it.
            hashes = hashes[: len(hashes) * block_size // unit * unit // block_size]
        self.index.stored(host, hashes)

    def told(self, hosts: Mapping[str, Hosting], changes: Iterable[CachedBlocks]) -> None:
        """A worker that hosts these models tells what it has cached."""
        for change in changes:
            host = hosts.get(change.model)
            if host is None:
                continue
            self._changed()
            if change.whole:
                self.index.forget(host)
            self._units[host] = change.unit
            self.index.removed(host, hashes_of(change.removed))
            self.index.stored(host, hashes_of(change.stored))
            if self.told_on is not None:
                self.told_on.told(host, change)

    def holds(self, model: str, block: bytes) -> bool:
        """Whether a host of a model has a block, as far as is known. Costs O(holders of the block)."""
        return any(host.model.name == model for host in self.index.matched(hashes_of(block)))

    def forget(self, host: Hosting) -> None:
        """A worker is gone, or serves a model no more."""
        self._changed()
        told = self._units.pop(host, None) is not None
        self.index.forget(host)
        if told and self.told_on is not None:
            self.told_on.lost(host)

    def _changed(self) -> None:
        self._prefix = self._model = None
        self._found = {}
