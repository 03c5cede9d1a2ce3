"""A cache of models some of whose layers keep a state: of one size per row, however long its text is.

Linear attention, state-space layers and short convolutions write over what they remember, so a state has no columns: none can
be cut off, none padded, and a step cannot be taken back. Rows join by lying below one another and leave by not being
selected. What layers of attention beside them hold are keys and values in columns, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer, get_layer_types_and_kwargs

from zfabric.backends.hf_transformers.cache.kv_cache import KVCache, KVCacheLayer

#: Kinds of layers with a state, by the names that configurations give them; some of them keep nothing at all.
STATES: Final = frozenset({"linear_attention", "conv", "moe", "mlp"})
#: Kinds with a state, and keys and values beside it.
BOTH: Final = frozenset({"hybrid", "hybrid_sliding"})


class StateLayer(LinearAttentionLayer):
    """States of one layer, each (rows, …): what a convolution has seen last, and what is made of all before."""

    @property
    def states(self) -> list[torch.Tensor]:
        """Those that the model has written."""
        return [one for kept in self._kept for one in kept.values() if one is not None]

    @property
    def _kept(self) -> tuple[dict[int, Any], dict[int, Any]]:
        return self.conv_states, self.recurrent_states

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order. A row may come twice."""
        self._make(lambda one, place, number: one.index_select(0, torch.tensor(rows, device=one.device)))

    def merge(self, other: Any) -> None:
        """Add the rows of another layer below these, or nothing if the memory does not suffice."""
        self._make(lambda one, place, number: torch.cat([one, other._kept[place][number]]))

    def undo_merge(self, rows: int, columns: int) -> None:
        """Go back to the first rows. Allocates nothing."""
        self._make(lambda one, place, number: one[:rows])

    def reserve(self, columns: int) -> None:
        """A state needs no room to grow."""

    def _make(self, made: Callable[[torch.Tensor, int, int], torch.Tensor]) -> None:
        """Replace each state, by its place and number: all of them or, if that raises, none."""
        new = [
            {number: None if one is None else made(one, place, number) for number, one in kept.items()}
            for place, kept in enumerate(self._kept)
        ]
        self.conv_states, self.recurrent_states = new


class StateAndKeysLayer(StateLayer, KVCacheLayer):
    """A layer that keeps a state, and keys and values beside it."""

    def __init__(self, number_of_states: int = 1) -> None:
        KVCacheLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which come without names, or of a state."""
        (KVCacheLayer if args else StateLayer).lazy_initialization(self, *args, **kwargs)

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order, and without the first `skip` columns."""
        KVCacheLayer.select(self, rows, skip)
        StateLayer.select(self, rows, skip)

    def merge(self, other: Any) -> None:
        """Add the rows of another layer below these, or nothing if the memory does not suffice."""
        rows, columns = self.keys.shape[0], self.get_seq_length()
        KVCacheLayer.merge(self, other)
        try:
            StateLayer.merge(self, other)
        except RuntimeError:
            KVCacheLayer.undo_merge(self, rows, columns)
            raise

    def undo_merge(self, rows: int, columns: int) -> None:
        """Go back to the first rows and the last columns. Allocates nothing."""
        KVCacheLayer.undo_merge(self, rows, columns)
        StateLayer.undo_merge(self, rows, columns)

    def reserve(self, columns: int) -> None:
        """Have room for so many columns."""
        KVCacheLayer.reserve(self, columns)


class StateCache(KVCache):
    """All layers, of the kinds that the configuration names.

    Args:
        config: Of the model.

    Attributes:
        passed: Columns so far; kept by whoever runs the model, since there may be no layer that knows.
        grows: Whether layers have keys and values, which take more room with each column.
    """

    rewinds = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = self._layers_of(config.get_text_config(decoder=True))
        self.grows = any(isinstance(layer, KVCacheLayer) for layer in self.layers)
        self.passed = 0

    @staticmethod
    def of_its_own(config: Any) -> Any:
        """The cache that a model has by itself; None where it makes one."""
        return DynamicCache(config=config)

    def given(self, model: Any, name: str) -> dict[str, Any]:
        """Arguments of the next pass.

        Args:
            model: That reads the states.
            name: What it calls its cache.
        """
        return {name: self}

    def taken(self, model: Any, made: Any) -> None:
        """What a pass has made comes here, if it was not written here."""

    def _layers_of(self, config: Any) -> list[Any]:
        kinds, arguments = get_layer_types_and_kwargs(config)
        return [_layer(kind, its.get("number_of_states", 1)) for kind, its in zip(kinds, arguments, strict=True)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return super().get_seq_length(layer_idx) if self.grows else self.passed

    @property
    def rows(self) -> int:
        """How many there are; none before the first pass."""
        for layer in self.layers:
            held = [*getattr(layer, "states", ()), *([] if getattr(layer, "keys", None) is None else [layer.keys])]
            if held:
                return int(held[0].shape[0])
        return 0

    def merge(self, other: Any) -> None:
        """Add the rows of another below these: in all layers, or in none if the memory does not suffice."""
        super().merge(other)
        self.passed = max(self.passed, other.passed)

    def select(self, rows: list[int], skip: int) -> None:
        """Go on with these rows, in this order, and without the first `skip` columns."""
        super().select(rows, skip)
        self.passed -= skip

    def crop_to(self, columns: int) -> None:
        """Raises: NotImplementedError: What was written over is gone."""
        raise NotImplementedError("a state cannot be taken back to fewer columns")


def state_bytes(cache: Any) -> int:
    """Bytes that the states of one row take in a cache that holds some."""
    states = [one for layer in getattr(cache, "layers", ()) for one in getattr(layer, "states", ())]
    return sum(one.element_size() * one[0].numel() for one in states)


def _layer(kind: str, states: int) -> Any:
    if kind in BOTH:
        return StateAndKeysLayer(states)
    return StateLayer(states) if kind in STATES else KVCacheLayer()
