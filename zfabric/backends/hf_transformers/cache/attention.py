"""Attention of padded rows without copies of the cache.

Where several heads share keys and values and a mask is given, transformers repeats the whole cache once per head, in each
layer and at each step: a torch kernel for a GPU does not take both. But heads that share keys and values are, in a step, as
good as several queries of one head, since all of them see the same columns.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from zfabric.backends.hf_transformers.cache.compiled_attention import attend_over_pages
from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.cache.scored_attention import scored_attention, scoring_of

_attention = torch.nn.functional.scaled_dot_product_attention


#: What models use this by whose own code would compute scores with sinks step by step.
SCORED: Final = "zfabric"


def install(model: Any = None) -> None:
    """Have all models of this process that use "sdpa" use this.

    Args:
        model: Is to use it as well, if its attention has sinks, for which transformers has no other way.
    """
    AttentionInterface.register("sdpa", attend)
    AttentionInterface.register(SCORED, attend)
    AttentionMaskInterface.register(SCORED, sdpa_mask)
    if model is None or model.config._attn_implementation != "eager" or not model._supports_attention_backend:
        return
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        model.set_attn_implementation(SCORED)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, as transformers calls it.

    Args:
        query: (rows, heads, columns, size).
        key, value: (rows, heads of the cache, columns of the cache, size).
        attention_mask: (rows, 1, columns, columns of the cache).
        others: With "indices", the keys that sparse attention has chosen for each column, (rows, columns, keys); models leave the
            others out themselves where they know the interface by its name.

    Returns:
        (rows, columns, heads, size), and no weights.
    """
    paged, scoring = current(), scoring_of(others)
    if paged is not None:
        layer = paged.layer_of(module, {"position_bias": position_bias, **others})
        window = others.get("sliding_window")
        if torch.compiler.is_compiling():
            return attend_over_pages(query, key, value, layer, scaling, window, scoring), None
        return paged.attend(query, layer, scaling, window, scoring), None
    chosen = others.get("indices")
    if chosen is not None and attention_mask is not None:
        attention_mask = attention_mask & _among(chosen, key.shape[2])
    if scoring is not None:
        told = others.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if told is None else told)
        return scored_attention(query, key, value, attention_mask, scaling, scoring, causal=causal), None
    rows, heads, columns, size = query.shape
    shared = heads // key.shape[1]
    padded = attention_mask is not None and attention_mask.shape[1] == 1 and position_bias is None and not dropout
    # A paged cache, which transformers' own batching passes along, is read by its own function alone.
    padded = padded and others.get("cache") is None
    if padded and shared > 1 and columns == 1:
        grouped = query.reshape(rows, key.shape[1], shared, size)
        output = _attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(rows, 1, heads, value.shape[3]), None
    if padded and shared > 1 and query.device.type == "cpu":
        output = _attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, position_bias=position_bias, **others
    )
    return found


def _among(chosen: torch.Tensor, columns: int) -> torch.Tensor:
    """Which columns of the cache are among those chosen, (rows, 1, columns, columns of the cache)."""
    found = torch.zeros((*chosen.shape[:2], columns), dtype=torch.bool, device=chosen.device)
    return found.scatter_(-1, chosen.long(), True).unsqueeze(1)
