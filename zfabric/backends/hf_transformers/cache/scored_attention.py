"""Attention whose scores are changed before they become weights: a cap (Gemma 2), and sinks, which take weight and give no value
(GPT-OSS). Torch's kernels do neither, so it is computed step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Scoring(NamedTuple):
    """What is done to scores.

    Attributes:
        softcap: They are kept between this and its negative, by a tangent.
        sinks: A score more for each head, (heads,).
    """

    softcap: float | None
    sinks: torch.Tensor | None


def scoring_of(others: Mapping[str, Any]) -> Scoring | None:
    """What arguments of attention ask for; None if nothing."""
    sinks = others.get("s_aux") if others.get("s_aux") is not None else others.get("sinks")
    softcap = others.get("softcap")
    return None if softcap is None and sinks is None else Scoring(softcap, sinks)


def scored_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    scoring: Scoring,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of rows; heads may share keys.

    Args:
        query: (rows, heads, columns, size).
        key, value: (rows, heads of the cache, keys, size).
        mask: Which keys are seen, or what is added to their scores, (rows or 1, 1, columns or 1, keys). None for what
            `causal` says.
        causal: The last column sees all keys, and each before it one less, if there is no mask.

    Returns:
        (rows, columns, heads, size of the values).
    """
    rows, heads, columns, size = query.shape
    shared, keys = heads // key.shape[1], key.shape[2]
    # Heads that share keys are as good as several queries of one head.
    grouped = query.reshape(rows, key.shape[1], shared * columns, size)
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, columns, keys)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is None and causal and columns > 1:
        mask = torch.ones((columns, keys), dtype=torch.bool, device=query.device).tril(keys - columns)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(scores.dtype).view(1, heads, 1, 1).expand(rows, heads, columns, 1)
        scores = torch.cat([scores, sinks], dim=3)
    # A column of padding sees nothing; whatever it is given, nobody reads it, but it has to be a number.
    weights = scores.softmax(dim=3, dtype=torch.float32).nan_to_num_()[..., :keys].to(value.dtype)
    output = weights.reshape(rows, key.shape[1], shared * columns, keys) @ value
    return output.view(rows, heads, columns, value.shape[3]).transpose(1, 2)
