"""States that models do not keep in transformers' cache, as rows of one that this backend keeps.

RecurrentGemma has them in its modules, and xLSTM and MiniMax have caches of classes of their own. What a model looks at in its
next pass is put there before, and what it has made is taken from there after.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.kv_cache import KVCacheLayer
from zfabric.backends.hf_transformers.cache.state_cache import BOTH, STATES, StateCache, StateLayer

#: States of a layer of xLSTM.
_CACHED: Final = 3


class ModuleStates(StateCache):
    """Of RecurrentGemma, whose blocks have them as attributes."""

    def given(self, model: Any, name: str) -> dict[str, Any]:
        """Each block finds the states of its rows; None before the first pass, for which it makes some."""
        for block, layer in self._blocks(model):
            block.conv1d_state, block.rg_lru.recurrent_states = layer.conv_states[0], layer.recurrent_states[0]
        return super().given(model, name)

    def taken(self, model: Any, made: Any) -> None:
        """They are held here alone: a row that leaves takes its memory along."""
        for block, layer in self._blocks(model):
            layer.conv_states[0], layer.recurrent_states[0] = block.conv1d_state, block.rg_lru.recurrent_states
            block.conv1d_state = block.rg_lru.recurrent_states = None

    def _layers_of(self, config: Any) -> list[Any]:
        return [StateLayer() if kind == "recurrent" else KVCacheLayer() for kind in config.layers_block_type]

    def _blocks(self, model: Any) -> list[tuple[Any, StateLayer]]:
        blocks = [layer.temporal_block for layer in model.model.layers]
        return [(block, its) for block, its in zip(blocks, self.layers, strict=True) if isinstance(its, StateLayer)]


class CachedStates(StateCache):
    """Of xLSTM, whose own cache has three a layer, and is written into."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._own: Any = None

    @staticmethod
    def of_its_own(config: Any) -> Any:
        """The model makes it."""
        return None

    def given(self, model: Any, name: str) -> dict[str, Any]:
        """The cache that the model has made in the first pass, with the states of these rows."""
        if self._own is not None:
            self._own.rnn_state = {number: tuple(layer.states) for number, layer in enumerate(self.layers)}
        return {name: self._own}

    def taken(self, model: Any, made: Any) -> None:
        """It returns its cache."""
        self._own = made.cache_params
        for number, layer in enumerate(self.layers):
            layer.recurrent_states = dict(enumerate(self._own.rnn_state[number]))

    def _layers_of(self, config: Any) -> list[Any]:
        return [StateLayer(_CACHED) for _ in range(config.num_hidden_layers)]


@cache
def _lightning() -> type[StateCache]:
    """Of MiniMax, which takes a cache of its own class alone."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class LightningStates(StateCache, MiniMaxCache):
        """Its linear layers ask for what they have."""

        @staticmethod
        def of_its_own(config: Any) -> Any:
            """The model makes it."""
            return None

        def __len__(self) -> int:
            return len(self.layers)

        def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
            """None before the first pass."""
            held: torch.Tensor | None = self.layers[layer_idx].recurrent_states[0]
            return held

        def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
            """What a layer has made."""
            self.layers[layer_idx].recurrent_states[0] = linear_cache

    return LightningStates


def state_cache_of(config: Any) -> type[StateCache] | None:
    """What keeps the states of a model, by its configuration; None if it has none."""
    if config.model_type == "minimax":
        return _lightning()
    if config.model_type in _OWN:
        return _OWN[config.model_type]
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    return StateCache if kinds & (STATES | BOTH) else None


_OWN: Final = {"recurrent_gemma": ModuleStates, "xlstm": CachedStates}
