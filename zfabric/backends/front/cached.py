"""Blocks of an engine's prefix cache as those by which prompts are hashed on the fabric.

Engines name blocks as they like: vLLM by hashes that depend on its version, a seed and more. What they store comes with its
tokens, so the fabric's hashes are made of these, and kept by the engine's name until the block goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from zfabric.limits import PREFIX_BLOCK_TOKENS, PREFIX_BLOCKS_MAX, PREFIX_HASH_BYTES
from zfabric.wire.prefixes import token_hashes
from zfabric.worker.base import StepSink


class _Block(NamedTuple):
    """What is known of one block of the engine."""

    model: str
    hashes: tuple[bytes, ...]
    depth: int


class CacheTranslator:
    """Takes an engine's events, and gathers what they change.

    Left out are blocks that no prompt of tokens alone finds again: such with images, with a salt, and what comes after them; and
    what is beyond the blocks that a request brings hashes of. Of two equal blocks, which vLLM has where equal prompts were
    computed at once, the first that goes counts for both.

    Args:
        model: Name of the model; adapters go by their own.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._known: dict[Any, _Block] = {}
        self._unit = 0
        self._stored: dict[str, dict[bytes, None]] = {}
        self._removed: dict[str, dict[bytes, None]] = {}
        self._cleared = False

    def stored(
        self,
        names: Sequence[Any],
        parent: Any,
        token_ids: Sequence[int],
        unit: int,
        adapter: str | None,
        keys: Sequence[Any] | None,
    ) -> None:
        """Blocks are cached, one after the other.

        Args:
            names: The engine's, of each of them.
            parent: Of the block before the first; None for the beginning of a prompt.
            token_ids: Of all of them.
            unit: Tokens of a block.
            adapter: Name of the adapter that computed them, where they are the first of a prompt.
            keys: For each block what it depends on besides its tokens.
        """
        if unit < PREFIX_BLOCK_TOKENS or unit % PREFIX_BLOCK_TOKENS:
            return
        self._unit = unit
        first = _Block(adapter or self._model, (bytes(PREFIX_HASH_BYTES),), 0)
        last = first if parent is None else self._known.get(parent)
        for place, name in enumerate(names):
            if last is None or last.depth >= PREFIX_BLOCKS_MAX or not _plain(keys, place, adapter):
                return
            tokens = token_ids[place * unit : (place + 1) * unit]
            joined = token_hashes(tokens, last.hashes[-1])
            hashes = tuple(
                joined[start : start + PREFIX_HASH_BYTES] for start in range(0, len(joined), PREFIX_HASH_BYTES)
            )
            last = self._known[name] = _Block(last.model, hashes, last.depth + len(hashes))
            self._note(self._stored, self._removed, last)

    def removed(self, names: Sequence[Any]) -> None:
        """Blocks are cached no more."""
        for name in names:
            block = self._known.pop(name, None)
            if block is not None:
                self._note(self._removed, self._stored, block)

    def cleared(self) -> None:
        """Nothing is cached any more, or nothing is known of it."""
        self._known.clear()
        self._stored.clear()
        self._removed.clear()
        self._cleared = True

    @property
    def due(self) -> bool:
        """Whether something changed."""
        return bool(self._cleared or self._stored or self._removed)

    def tell(self, models: Sequence[str], steps: StepSink) -> None:
        """Tell what changed since the last time, from any thread. Args: models: All that are served now."""
        cleared, self._cleared = self._cleared, False
        stored, self._stored = self._stored, {}
        removed, self._removed = self._removed, {}
        for model in models:
            if cleared or model in stored or model in removed:
                steps.cache_changed_threadsafe(
                    model, [*stored.get(model, ())], [*removed.get(model, ())], unit=self._unit, cleared=cleared
                )

    @staticmethod
    def _note(to: dict[str, dict[bytes, None]], from_: dict[str, dict[bytes, None]], block: _Block) -> None:
        others = from_.get(block.model, {})
        here = to.setdefault(block.model, {})
        for one in block.hashes:
            others.pop(one, None)
            here[one] = None


def _plain(keys: Sequence[Any] | None, place: int, adapter: str | None) -> bool:
    """Whether a block depends on its tokens and its adapter alone."""
    own = tuple(keys[place] or ()) if keys is not None and place < len(keys) else ()
    return own in {(), (adapter,)}
