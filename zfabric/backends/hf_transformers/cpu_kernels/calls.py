"""The kernels, called with tensors. Importing this imports numba, which may be missing: see `available.kernels`."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import torch

from zfabric.backends.hf_transformers.cpu_kernels import attention_kernel, layer_kernels

#: Kinds of numbers as `vectors` tells them; see `available.takes`.
_KINDS: Final[dict[torch.dtype, Any]] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
#: Queries of one head that are computed at once, at most: as many sums as a processor has registers for, twice over.
_EACH_MAX: Final = 8


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    tokens: torch.Tensor,
    tables: torch.Tensor,
    block: int,
    scaling: float,
) -> None:
    """Attention of tokens to keys in blocks; see `attention_kernel.attend`.

    Args:
        queries: (all tokens, heads of queries, size), of which each token's lie together.
        keys, values: (places, heads, size of each), contiguous, and of the queries' type.
        output: (all tokens, heads of queries, size of values), contiguous.
        tokens: int64 (count, 4).
        tables: int64 (rows, blocks).
    """
    heads, size, value_size = keys.shape[1], keys.shape[2], values.shape[2]
    group = queries.shape[1] // heads
    each = _each(group)
    # Held here until the kernel is done: numba lets go of what it does not name any more.
    space = torch.empty(attention_kernel.space_bytes(len(each), size, value_size), dtype=torch.uint8)
    attention_kernel.attend(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), output.data_ptr(), tokens.data_ptr(), tables.data_ptr(),
        tokens.shape[0], queries.stride(0), heads, group, size, value_size, tables.shape[1], block,
        np.float32(scaling), space.data_ptr(), _KINDS[queries.dtype], each,
    )  # fmt: skip


def add_and_norm(
    states: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """The norm of states, to which something is added in place before: all contiguous, and of one type."""
    output = torch.empty_like(states)
    size = states.shape[-1]
    layer_kernels.add_and_norm(
        states.data_ptr(), 0 if added is None else added.data_ptr(), weight.data_ptr(), output.data_ptr(),
        states.numel() // size, size, np.float32(epsilon), _KINDS[states.dtype],
    )  # fmt: skip
    return output


def turn_and_write(
    heads: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    epsilon: float,
) -> None:
    """Turn queries and keys in place, and write keys and values to a pool; see `layer_kernels.turn_and_write`.

    Args:
        heads: Queries, keys and values, (tokens, heads, size).
        turns: Cosines and sines, (tokens, size).
        slots: int64 (tokens,).
        keys, values: (places, heads of the cache, size).
        norms: Weights of norms of queries and of keys.
    """
    count, key_heads, size = heads.shape[0], keys.shape[1], keys.shape[2]
    query_norm, key_norm = (0, 0) if norms is None else (one.data_ptr() for one in norms)
    layer_kernels.turn_and_write(
        heads.data_ptr(), turns[0].data_ptr(), turns[1].data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr(),
        query_norm, key_norm, count, heads.shape[1] - 2 * key_heads, key_heads, size, np.float32(epsilon), _KINDS[heads.dtype],
    )  # fmt: skip


def gate(given: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of (…, 2 × size), times the second: (…, size)."""
    size = given.shape[-1] // 2
    output = given.new_empty((*given.shape[:-1], size))
    layer_kernels.gate(given.data_ptr(), output.data_ptr(), output.numel() // size, size, _KINDS[given.dtype])
    return output


@cache
def _each(group: int) -> tuple[int, ...]:
    """As many members as queries of a group are computed at once."""
    return (0,) * max(count for count in range(1, _EACH_MAX + 1) if group % count == 0)
