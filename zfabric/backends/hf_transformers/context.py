"""How long a model's context is."""

from __future__ import annotations

from typing import Any, Final

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


def context_length(config: Any) -> int:
    """Tokens of prompt and answer, as FastChat finds them: the first key that is set, times the rope scaling factor."""
    scaling = getattr(config, "rope_scaling", None) or {}
    factor = float(scaling.get("factor") or 1.0) if scaling.get("rope_type", scaling.get("type")) != "llama3" else 1.0
    for key in _LENGTH_KEYS:
        value = getattr(config, key, None)
        if value:
            return int(factor * value)
    return _LENGTH_DEFAULT
