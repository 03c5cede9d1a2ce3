"""Attention over pages: the tokens of all rows of a pass in one line, each row's keys and values in blocks of one pool.

Where there are kernels for a CPU (`cpu_kernels`), they read rows where they lie, and torch computes long parts of prompts.
Elsewhere on a CPU a row is read in place, one call for each run of blocks that lie side by side, and the runs' answers are
weighed by their sums of exponentials. A call costs more than a short row's copy, so short rows are gathered and computed
together. A CUDA device has a kernel that reads block tables (`torch.nn.attention.varlen`); where that does not take them, as
with keys of 8 bits, rows are gathered.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Final

import torch

from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass, Plan, Stretches
from zfabric.backends.hf_transformers.cache.scored_attention import Scoring, scored_attention
from zfabric.backends.hf_transformers.cache.token_plan import TokenPlan
from zfabric.backends.hf_transformers.cpu_kernels.available import kernels, takes

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_attention = torch.nn.functional.scaled_dot_product_attention
_with_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
#: A row in more pieces is copied: a call for each takes longer.
_RUNS_MAX: Final = 8
#: The kernel's limit.
_HEAD_SIZE_MAX: Final = 256
_TABLES: Final = varlen_attn is not None and "block_table" in inspect.signature(varlen_attn).parameters


class Pool:
    """Keys and values of one layer, and the forms in which they are looked at, made once: that takes longer than it seems.

    Args:
        keys, values: (places, heads, size).
        block_tokens: Places of a block.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, block_tokens: int) -> None:
        self.keys, self.values = keys, values
        self.heads, self.size, self.value_size = keys.shape[1], keys.shape[2], values.shape[2]
        #: Of which type queries can be that kernels for a CPU compute.
        self.dense = keys.dtype if takes(keys.device, keys.dtype, self.size, self.value_size) else None
        self.token_bytes = self.heads * (self.size + self.value_size) * keys.element_size()
        #: As attention has them, (1, heads, places, size).
        self.lined_keys, self.lined_values = (one.transpose(0, 1).unsqueeze(0) for one in (keys, values))
        #: (blocks, places, heads, size).
        self.blocks: tuple[torch.Tensor, ...] = tuple(one.unflatten(0, (-1, block_tokens)) for one in (keys, values))

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens, (1, heads, tokens, size)."""
        self.lined_keys.index_copy_(2, slots, keys)
        self.lined_values.index_copy_(2, slots, values)

    def view(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A stretch, in place: keys and values, (1, heads, tokens, size)."""
        return self.lined_keys[:, :, begin:end], self.lined_values[:, :, begin:end]

    def gather(self, its: Stretches) -> tuple[torch.Tensor, torch.Tensor]:
        """All of a row, (1, heads, tokens, size), in place if it is one stretch."""
        if its.blocks is None:
            return self.view(*its.runs[0])
        keys, values = (
            one.index_select(0, its.blocks)
            .flatten(0, 1)[its.first : its.first + its.tokens]
            .transpose(0, 1)
            .unsqueeze(0)
            for one in self.blocks
        )
        return keys, values

    def side_by_side(self, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of several rows, copied: (rows, heads, places, size)."""
        keys, values = (
            one.index_select(0, index).view(rows, -1, self.heads, one.shape[3]).transpose(1, 2) for one in self.blocks
        )
        return keys, values


def attend(
    passed: PagedPass,
    query: torch.Tensor,
    pool: Pool,
    scaling: float | None,
    window: int | None,
    scoring: Scoring | None = None,
) -> torch.Tensor:
    """Causal attention of each row's tokens to its own.

    Args:
        query: (1, heads, tokens, size).
        pool: Where keys and values lie.
        window: Tokens that each sees, itself included; None for all before it.
        scoring: What is done to the scores, if anything is.

    Returns:
        (1, tokens, heads, size of the values).
    """
    # Of all tokens: (1, tokens, heads, size).
    tokens = query.transpose(1, 2)
    if scoring is not None:
        plan = passed.plan(window, pool.token_bytes, query)
        return _scored(plan, tokens[0], pool, scaling, scoring).unsqueeze(0)
    if not passed.spans and by_tables(query, pool):
        plan = passed.plan(window, pool.token_bytes, query)
        longest = max(passed.lengths)
        return varlen(tokens[0], pool, plan.tensors, max(passed.counts), longest, scaling, window).unsqueeze(0)
    count = tokens.shape[1]
    fast = kernels() if pool.dense is query.dtype else None
    if fast is not None:
        return _one_by_one(fast, passed, tokens[0], pool, scaling, window).unsqueeze(0)
    plan = passed.plan(window, pool.token_bytes, query)
    # Heads that share keys are, for one token, as good as several queries of one head.
    grouped = tokens.reshape(count, pool.heads, -1, pool.size)
    if plan.whole:
        return _side_by_side(plan, grouped, pool, scaling).view(1, count, -1, pool.value_size)
    if len(plan.in_place) == count == 1:
        return _one_row(grouped, plan.in_place[0][1], pool, scaling).view(1, 1, -1, pool.value_size)
    output = query.new_empty((count, query.shape[1], pool.value_size))
    if plan.gathered:
        output[plan.rows] = _side_by_side(plan, grouped[plan.rows], pool, scaling).flatten(1, 2)
    for row, its in plan.in_place:
        output[row] = _one_row(grouped[row : row + 1], its, pool, scaling).flatten(0, 2)
    for begin, end, its, mask in plan.parts:
        output[begin:end] = _part(query[:, :, begin:end], its, pool, mask, scaling)
    return output.unsqueeze(0)


def _one_by_one(
    fast: ModuleType,
    passed: PagedPass,
    tokens: torch.Tensor,
    pool: Pool,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention by a CPU's kernel, and of long parts by torch's: (tokens, heads, size of the values)."""
    plan = passed.kept.get(window)
    if plan is None:
        plan = passed.kept[window] = TokenPlan(passed, window)
    heads, size = tokens.shape[1:]
    if tokens.stride()[1:] != (size, 1):
        tokens = tokens.contiguous()
    output = tokens.new_empty((tokens.shape[0], heads, pool.value_size))
    factor = size**-0.5 if scaling is None else scaling
    fast.attend(tokens, pool.keys, pool.values, output, plan.tokens, plan.tables, passed.block_tokens, factor)
    for begin, end, its, mask in plan.parts:
        output[begin:end] = _part(tokens[begin:end].transpose(0, 1).unsqueeze(0), its, pool, mask, scaling)
    return output


def _scored(plan: Plan, tokens: torch.Tensor, pool: Pool, scaling: float | None, scoring: Scoring) -> torch.Tensor:
    """(tokens, heads, size)."""
    output = tokens.new_empty((*tokens.shape[:2], pool.value_size))
    if plan.gathered:
        index, added = plan.index
        keys, values = pool.side_by_side(index, len(plan.gathered))
        queries = tokens[plan.rows].unsqueeze(2)
        output[plan.rows] = scored_attention(queries, keys, values, added, scaling, scoring)[:, 0]
    alone = [(row, row + 1, its, None) for row, its in plan.in_place]
    for begin, end, its, mask in [*alone, *plan.parts]:
        keys, values = pool.gather(its)
        queries = tokens[begin:end].transpose(0, 1).unsqueeze(0)
        output[begin:end] = scored_attention(queries, keys, values, mask, scaling, scoring)[0]
    return output


def _side_by_side(plan: Plan, tokens: torch.Tensor, pool: Pool, scaling: float | None) -> torch.Tensor:
    """(rows, heads of the cache, heads that share one, size)."""
    index, added = plan.index
    keys, values = pool.side_by_side(index, tokens.shape[0])
    return _attention(tokens, keys, values, attn_mask=added, scale=scaling)


def _one_row(token: torch.Tensor, its: Stretches, pool: Pool, scaling: float | None) -> torch.Tensor:
    """(1, heads of the cache, heads that share one, size)."""
    if not 1 < len(its.runs) <= _RUNS_MAX or pool.size != pool.value_size:
        return _attention(token, *pool.gather(its), scale=scaling)
    found = [_with_sums(token, *pool.view(*run), scale=scaling) for run in its.runs]
    sums = torch.stack([one[1] for one in found])
    weights = sums.softmax(dim=0).unsqueeze(-1)
    return (torch.stack([one[0] for one in found]) * weights).sum(dim=0).to(token.dtype)


def _part(
    query: torch.Tensor, its: Stretches, pool: Pool, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """(tokens, heads, size)."""
    keys, values = pool.gather(its)
    if query.device.type != "cpu" and mask is not None:
        # With both a mask and shared heads, kernels of devices fall back to the slowest.
        shared = query.shape[1] // pool.heads
        keys, values = (one.repeat_interleave(shared, dim=1) for one in (keys, values))
    shares = query.shape[1] != keys.shape[1]
    found = _attention(query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shares)
    return found[0].transpose(0, 1)


def by_tables(query: torch.Tensor, pool: Pool) -> bool:
    """Whether the kernel for block tables takes it."""
    if not _TABLES or query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if pool.keys.dtype != query.dtype:
        return False
    size = query.shape[-1]
    return size == pool.size == pool.value_size and size <= _HEAD_SIZE_MAX and size % 8 == 0


def varlen(
    tokens: torch.Tensor,
    pool: Pool,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    most: int,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention by the kernel for block tables.

    Args:
        tokens: (tokens, heads, size).
        tables: Ends of the rows' tokens, their lengths, their tables; int32.
        most: Tokens that any row has here, or more.
        longest: Tokens of the longest row, or more.

    Returns:
        (tokens, heads, size).
    """
    ends, lengths, blocks = tables
    keys, values = pool.blocks
    found: torch.Tensor = varlen_attn(
        tokens.contiguous(),
        keys,
        values,
        ends,
        None,
        most,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=tokens.shape[1] != pool.heads,
        seqused_k=lengths,
        block_table=blocks,
    )
    return found
