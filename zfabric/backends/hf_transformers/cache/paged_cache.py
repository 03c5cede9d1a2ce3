"""The pool of keys and values, and what a model of transformers takes for its cache in a pass over pages."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers.cache_utils import Cache

from zfabric.backends.hf_transformers.cache.kv_cache import KVCacheLayer
from zfabric.backends.hf_transformers.cache.kv_layout import ONE_TABLE, KVLayout
from zfabric.backends.hf_transformers.cache.narrow_pool import NarrowPool
from zfabric.backends.hf_transformers.cache.paged_attention import Pool, attend, by_tables
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass
from zfabric.backends.hf_transformers.cache.scored_attention import Scoring
from zfabric.backends.hf_transformers.cache.static_pass import StaticPass
from zfabric.backends.hf_transformers.options import Narrow

#: Small, so that little is lost at a row's end and beginnings are shared to the token but few. The kernel of a CUDA device
#: that reads block tables wants multiples of 256.
_BLOCK_TOKENS: Final = {"cuda": 256}
_BLOCK_TOKENS_OTHER: Final = 16
#: Arguments of attention that change its answer and are not followed over pages.
_NOT_FOLLOWED: Final = ("position_bias", "attention_bias", "head_mask")

_running = threading.local()


def block_tokens(device: torch.device) -> int:
    """Tokens that a block has room for."""
    return _BLOCK_TOKENS.get(device.type, _BLOCK_TOKENS_OTHER)


def current() -> PagedCache | None:
    """The cache of the pass that this thread is in, if it is one over pages."""
    return getattr(_running, "cache", None)


class PagedCache(Cache):
    """Blocks of all layers, allocated when a layer of each slot is first written to, and never moved. On a CPU they take memory
    when they are first written to themselves.

    Args:
        blocks: How many there are; one more is for passes that belong to nobody, `scratch`.
        tokens: That each has room for.
        narrow: Of which 8 bits keys and values are; None for those of the model's type.
        layout: Which layers share blocks.

    Attributes:
        windows: Of each layer, as it asked for it: tokens that one sees, None for all before it.
    """

    def __init__(self, blocks: int, tokens: int, narrow: Narrow | None = None, layout: KVLayout = ONE_TABLE) -> None:
        super().__init__(layer_class_to_replicate=KVCacheLayer)
        self._narrow: Final = narrow
        self.scratch: Final = blocks
        self.tokens: Final = tokens
        self.windows: dict[int, int | None] = {}
        self.layout: Final = layout
        self._places = _Places(layout.places)
        #: Of slots.
        self._pools: dict[int, Pool] = {}
        self._passes: Sequence[PagedPass | StaticPass] = ()
        self._slots: Sequence[torch.Tensor] = ()
        #: Whether what is done to scores keeps kernels from them.
        self._scored = False
        self._layer: int | None = None

    @contextmanager
    def during(self, passes: Sequence[PagedPass | StaticPass], slots: Sequence[torch.Tensor]) -> Iterator[None]:
        """For one pass of this thread.

        Args:
            passes: By each table of its rows.
            slots: Where its tokens go, by each table.
        """
        self._passes, self._slots, self._layer = passes, slots, None
        _running.cache = self
        try:
            yield
        finally:
            _running.cache = None
            self._passes = self._slots = ()

    @property
    def passed(self) -> PagedPass | None:
        """The pass under way, by the first table, unless it is a step over static buffers."""
        first = self._passes[0] if self._passes else None
        return first if isinstance(first, PagedPass) else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing: each token's place is told to the model."""
        return 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Write the pass's tokens, (1, heads, tokens, size), to where they belong."""
        # Compiled code does not see where that is: attention writes them there, see `compiled_attention`.
        if not torch.compiler.is_compiling():
            self.write(key_states, value_states, layer_idx)
        self._layer = layer_idx
        return key_states, value_states

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor, layer: int) -> None:
        """Write the pass's tokens of a layer, (1, heads, tokens, size), to where they belong."""
        slots, pool = self.places(layer)
        if pool is None:
            pool = self._pools[self._places[layer][1]] = self._pool(key_states, value_states)
        pool.write(slots, key_states, value_states)

    def places(self, layer: int) -> tuple[torch.Tensor, Pool | None]:
        """Where the pass's tokens of a layer are written: places in its pool, which is None before anything was."""
        table, slot = self._places[layer]
        return self._slots[table], self._pools.get(slot)

    def layer_of(self, module: Any, others: dict[str, Any]) -> int:
        """The layer that was written to last, whose attention is asked for.

        Raises:
            NotImplementedError: It is of a kind that is not computed over pages.
        """
        layer, self._layer = self._layer, None
        if layer is None:
            raise NotImplementedError("attention to what is not in the cache")
        for name in _NOT_FOLLOWED:
            if others.get(name) is not None:
                raise NotImplementedError(f"attention with {name}")
        causal = others.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise NotImplementedError("attention to later tokens")
        return layer

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        scaling: float | None,
        window: int | None,
        scoring: Scoring | None = None,
    ) -> torch.Tensor:
        """Attention of a layer, (1, tokens, heads, size)."""
        self.windows[layer] = window
        table, slot = self._places[layer]
        passed, pool = self._passes[table], self._pools[slot]
        if scoring is not None:
            self._scored = True
        if isinstance(passed, StaticPass):
            return passed.attend(query, pool, scaling, window, scoring)
        return attend(passed, query, pool, scaling, window, scoring)

    @property
    def alike(self) -> bool:
        """Whether a token takes as much in all layers that were written to, each of which has a slot of its own."""
        return len({(pool.heads, pool.size, pool.value_size, pool.keys.dtype) for pool in self._pools.values()}) == 1

    def step_bytes(self, length: int) -> int:
        """Bytes of keys and values that a step of a row of so many tokens reads."""
        return sum(
            (length if window is None else min(length, window)) * self._pools[self._places[layer][1]].token_bytes
            for layer, window in self.windows.items()
        )

    def by_tables(self) -> bool:
        """Whether a kernel that reads block tables takes all layers that were written to."""
        return not self._scored and all(by_tables(pool.keys, pool) for pool in self._pools.values())

    def copy(self, source: int, target: int) -> None:
        """What one block holds, to another."""
        for pool in self._pools.values():
            for blocks in pool.blocks:
                blocks[target] = blocks[source]

    def _pool(self, keys: torch.Tensor, values: torch.Tensor) -> Pool:
        """For tokens like these, (1, heads, tokens, size)."""
        places = (self.scratch + 1) * self.tokens

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return _zeros(shape, dtype, keys.device)

        if self._narrow is not None:
            return NarrowPool(self._narrow, places, keys, values, self.tokens, allocate)
        stored, beside = (allocate((places, one.shape[1], one.shape[3]), one.dtype) for one in (keys, values))
        return Pool(stored, beside, self.tokens)


class _Places(dict[int, tuple[int, int]]):
    """Table and slot of each layer. One that is not named is in the first table, and has a slot of its own."""

    def __missing__(self, layer: int) -> tuple[int, int]:
        found = self[layer] = (0, layer)
        return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # What nobody wrote must be finite: it is masked by a product with zero.
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Memory that the system gives page by page, as blocks are first written to: a pool costs what it has held, and
    # several models that could not all be full live beside one another. It reads as zero until then.
    space = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(space, dtype=dtype).view(shape)
