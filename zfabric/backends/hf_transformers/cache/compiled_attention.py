"""Attention over pages as one operation of torch, which its compiler calls and does not look into.

Where a row's keys lie differs from step to step, so compiled code could not read them as it was traced. What it hands over, it
hands to the pass under way: keys and values are written, and attention is computed as in any other pass.
"""

from __future__ import annotations

from typing import Final

import torch

from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.cache.scored_attention import Scoring

_LIBRARY: Final = torch.library.Library("zfabric", "FRAGMENT")
_NAME: Final = "attend_over_pages"
_LIBRARY.define(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, int layer, float? scaling, int? window, float? softcap, Tensor? sinks) -> "
    "Tensor"
)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    cache = current()
    assert cache is not None
    cache.write(key, value, layer)
    scoring = None if softcap is None and sinks is None else Scoring(softcap, sinks)
    return cache.attend(query, layer, scaling, window, scoring).contiguous()


def _shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


_LIBRARY.impl(_NAME, _attend, "CompositeExplicitAutograd")
torch.library.register_fake(f"zfabric::{_NAME}", _shape, lib=_LIBRARY)


def attend_over_pages(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scaling: float | None,
    window: int | None,
    scoring: Scoring | None,
) -> torch.Tensor:
    """Write keys and values of a layer to the pool of the pass under way, and attend.

    Args:
        query: (1, heads, tokens, size).
        key, value: (1, heads of the cache, tokens, size).
        window: Tokens that each sees, itself included; None for all before it.
        scoring: What is done to the scores, if anything is.

    Returns:
        (1, tokens, heads, size of the values).
    """
    softcap, sinks = (None, None) if scoring is None else scoring
    found: torch.Tensor = torch.ops.zfabric.attend_over_pages(query, key, value, layer, scaling, window, softcap, sinks)
    return found
