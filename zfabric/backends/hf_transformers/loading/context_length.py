"""How long a model's context is, and what the cache takes for each token of it."""

from __future__ import annotations

import re
from typing import Any, Final

import torch

#: Where configurations keep the length of the context, in FastChat's order.
_LENGTH_KEYS: Final = (
    "max_position_embeddings",
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
)
#: FastChat's value for a configuration that tells none.
_LENGTH_DEFAULT: Final = 2_048
#: Scalings of rope that stretch the length that the configuration tells. All others tell the stretched one.
_STRETCHED: Final = frozenset({"linear", "dynamic"})
#: Names of tables with a vector for each place.
_TABLES: Final = frozenset({"position_embeddings", "position_embedding", "embed_positions", "wpe", "wp_embeddings"})
#: Parts of a model that read no text, and have places of their own.
_OTHER_SENSES: Final = re.compile(r"vision|visual|image|audio|speech")


def context_length(config: Any) -> int:
    """Tokens of prompt and answer: the first key that is set, times the factor of a rope scaling that wants it."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = float(scaling.get("factor") or 1.0)
    for key in _LENGTH_KEYS:
        value = getattr(config, key, None)
        if value and int(value) > 0:
            if kind in _STRETCHED:
                return int(factor * value)
            if kind == "yarn":
                # Some tell the stretched length, and some the one that is stretched, which stands beside it.
                return max(int(value), int(factor * (scaling.get("original_max_position_embeddings") or 0)))
            return int(value)
    return _LENGTH_DEFAULT


def places(model: Any) -> int | None:
    """Tokens for which a model has places, if it keeps a vector for each; None if it does not.

    Args:
        model: The part that reads text.
    """
    found = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1) - _offset(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _TABLES
        and isinstance(module, torch.nn.Embedding)
        and not _OTHER_SENSES.search(name)
    ]
    return min(found, default=None)


def _offset(module: Any) -> int:
    """Places at the beginning that no token has, in a table that leaves them out by itself."""
    value = getattr(module, "offset", 0)
    return value if isinstance(value, int) else 0


def token_bytes(cache: Any) -> int:
    """Bytes that one token takes in a cache that holds some: in all layers, as the model itself wrote them."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    layers = [*layers, *(layer.index for layer in layers if getattr(layer, "index", None) is not None)]
    both: list[Any] = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [tensor for tensor in both if tensor is not None]
    return sum(tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)
