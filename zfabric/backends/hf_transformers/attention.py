"""Attention of padded rows without copies of the cache.

Where several heads share keys and values and a mask is given, transformers repeats the whole cache once per head, in each
layer and at each step: a torch kernel for a GPU does not take both. But heads that share keys and values are, in a step, as
good as several queries of one head, since all of them see the same columns.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zfabric.backends.hf_transformers.paged_cache import current

_attention = torch.nn.functional.scaled_dot_product_attention


def install() -> None:
    """Have all models of this process that use "sdpa" use this."""
    AttentionInterface.register("sdpa", attend)


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

    Returns:
        (rows, columns, heads, size), and no weights.
    """
    paged = current()
    if paged is not None:
        return paged.attend(module, query, scaling, {"position_bias": position_bias, **others}), None
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
