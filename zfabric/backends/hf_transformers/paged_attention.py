"""Attention over pages: the tokens of all rows of a pass in one line, each row's keys and values in blocks of one pool.

On a CPU a row is read in place, one call for each run of blocks that lie side by side, and the runs' answers are weighed by
their sums of exponentials. A call costs more than a short row's copy, so short rows are gathered and computed together. A
CUDA device has a kernel that reads block tables (`torch.nn.attention.varlen`); where that does not take them, rows are
gathered.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

_attention = torch.nn.functional.scaled_dot_product_attention
_with_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
#: A row of fewer bytes, keys and values of a layer, is copied in less time than a call of its own takes: 8 rows of 92 KB take 83
#: instead of 146 µs, of 460 KB 518 instead of 317 µs.
_GATHERED_BYTES_MAX: Final = 192 * 1024
#: The kernel's limit.
_HEAD_SIZE_MAX: Final = 256
_TABLES: Final = varlen_attn is not None and "block_table" in inspect.signature(varlen_attn).parameters

#: Where a row's tokens lie: begins and ends of stretches of the pool.
Runs = list[tuple[int, int]]


class PagedPass:
    """What one pass computes, and where its rows lie.

    Args:
        counts: Tokens of each row that are computed; rows with one come first.
        lengths: Of each row afterwards.
        tables: Blocks of each row.
        block_tokens: Tokens that a block has room for.
    """

    def __init__(
        self, counts: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]], block_tokens: int
    ) -> None:
        self.counts, self.lengths, self._tables = counts, lengths, tables
        self.block_tokens = block_tokens
        self.singles = sum(count == 1 for count in counts)
        self._plans: dict[Any, _Plan] = {}

    def slots(self) -> list[int]:
        """Where in the pool the tokens go."""
        size = self.block_tokens
        return [
            table[place // size] * size + place % size
            for count, length, table in zip(self.counts, self.lengths, self._tables, strict=True)
            for place in range(length - count, length)
        ]

    def blocks(self, row: int, low: int) -> tuple[Sequence[int], int]:
        """Those that hold its tokens from `low` on, and the first token in them."""
        size, first = self.block_tokens, low // self.block_tokens
        return self._tables[row][first : -(-self.lengths[row] // size)], first * size

    def runs(self, row: int, low: int) -> Runs:
        """Where its tokens from `low` on lie."""
        size, length, table = self.block_tokens, self.lengths[row], self._tables[row]
        found: Runs = []
        for number in range(low // size, -(-length // size)):
            begin = table[number] * size + max(0, low - number * size)
            end = table[number] * size + min(size, length - number * size)
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))
        return found

    def plan(self, window: int | None, token_bytes: int, device: torch.device) -> _Plan:
        """How to compute it, made once for all layers that are alike.

        Args:
            window: Tokens that each sees, itself included; None for all before it.
            token_bytes: Of keys and values in a layer.
        """
        key = (window, token_bytes, device)
        if key not in self._plans:
            self._plans[key] = _Plan(self, window, token_bytes, device)
        return self._plans[key]

    def low(self, row: int, window: int | None) -> int:
        """The first token that any of the row's computed ones sees."""
        return 0 if window is None else max(0, self.lengths[row] - self.counts[row] + 1 - window)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a kernel that reads block tables: ends of the rows' tokens, their lengths, their tables; int32."""
        ends = torch.tensor([0, *self.counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        width = max(len(table) for table in self._tables)
        tables = torch.tensor([[*table, *[0] * (width - len(table))] for table in self._tables], dtype=torch.int32)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return ends.to(device), lengths.to(device), tables.to(device)


class _Plan:
    """How one kind of layer is computed in a pass."""

    def __init__(self, passed: PagedPass, window: int | None, token_bytes: int, device: torch.device) -> None:
        self._passed, self._window, self._device = passed, window, device
        self.block_tokens = passed.block_tokens
        sizes = [passed.lengths[row] - passed.low(row, window) for row in range(passed.singles)]
        bound = _GATHERED_BYTES_MAX // token_bytes if device.type == "cpu" else max(sizes, default=0)
        self.gathered = [row for row, size in enumerate(sizes) if size <= bound]
        self.in_place = [
            (row, passed.runs(row, passed.low(row, window))) for row, size in enumerate(sizes) if size > bound
        ]

    @cached_property
    def rows(self) -> torch.Tensor | slice:
        """Those that are gathered, among the tokens."""
        if len(self.gathered) == self._passed.singles:
            return slice(0, self._passed.singles)
        return torch.tensor(self.gathered, device=self._device)

    @cached_property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of their keys, (rows, blocks), and which places in those are in use, (rows, 1, 1, places)."""
        passed = self._passed
        blocks, used = [], []
        for row in self.gathered:
            low = passed.low(row, self._window)
            its, begin = passed.blocks(row, low)
            blocks.append(its)
            used.append((low - begin, passed.lengths[row] - begin))
        width = max(map(len, blocks))
        index = torch.tensor([its if len(its) == width else [*its, *[0] * (width - len(its))] for its in blocks])
        places = torch.arange(width * passed.block_tokens)
        bounds = torch.tensor(used).view(-1, 2, 1, 1, 1)
        mask = places < bounds[:, 1]
        if self._window is not None:
            mask &= places >= bounds[:, 0]
        return index.to(self._device), mask.to(self._device)

    @cached_property
    def parts(self) -> list[tuple[int, int, Runs, torch.Tensor | None]]:
        """Rows of several tokens: begin and end among the tokens, where the keys lie, and which of them each token sees."""
        passed, made = self._passed, []
        begin = passed.singles
        for row in range(passed.singles, len(passed.counts)):
            count, length = passed.counts[row], passed.lengths[row]
            low = passed.low(row, self._window)
            mask = None
            if count < length or self._window is not None:
                queries = torch.arange(length - count, length, device=self._device).unsqueeze(1)
                keys = torch.arange(low, length, device=self._device).unsqueeze(0)
                mask = keys <= queries
                if self._window is not None:
                    mask &= queries - keys < self._window
            made.append((begin, begin + count, passed.runs(row, low), mask))
            begin += count
        return made

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `PagedPass.tensors`."""
        return self._passed.tensors(self._device)


def attend(
    passed: PagedPass,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of each row's tokens to its own.

    Args:
        query: (1, heads, tokens, size).
        keys, values: The pool's, (places, heads of the cache, size).
        window: Tokens that each sees, itself included; None for all before it.

    Returns:
        (1, tokens, heads, size of the values).
    """
    # (tokens, heads of the cache, heads that share one, size)
    tokens = query[0].transpose(0, 1)
    token_bytes = (keys[0].numel() + values[0].numel()) * keys.element_size()
    plan = passed.plan(window, token_bytes, query.device)
    if _by_tables(query, keys, values):
        return _varlen(passed, plan, tokens, keys, values, scaling, window).unsqueeze(0)
    output = tokens.new_empty((tokens.shape[0], tokens.shape[1], values.shape[2]))
    if plan.gathered:
        output[plan.rows] = _side_by_side(plan, _grouped(tokens[plan.rows], keys), keys, values, scaling)
    for row, runs in plan.in_place:
        one = _grouped(tokens[row : row + 1], keys)
        output[row] = _one_row(one, runs, keys, values, scaling).flatten(0, 2)
    for begin, end, runs, mask in plan.parts:
        output[begin:end] = _part(query[:, :, begin:end], runs, keys, values, mask, scaling)
    return output.unsqueeze(0)


def _grouped(tokens: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Heads that share keys are, for one token, as good as several queries of one head."""
    return tokens.unflatten(1, (keys.shape[1], -1))


def _side_by_side(
    plan: _Plan, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    index, mask = plan.index
    chosen = index.flatten()
    gathered = (
        pool.view(-1, plan.block_tokens, *pool.shape[1:])
        .index_select(0, chosen)
        .view(tokens.shape[0], -1, *pool.shape[1:])
        .transpose(1, 2)
        for pool in (keys, values)
    )
    return _attention(tokens, *gathered, attn_mask=mask, scale=scaling).flatten(1, 2)


def _one_row(
    token: torch.Tensor, runs: Runs, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """(1, heads of the cache, heads that share one, size)."""
    if len(runs) > 1 and keys.shape[2] != values.shape[2]:
        return _attention(token, _gather(keys, runs), _gather(values, runs), scale=scaling)
    if len(runs) == 1:
        return _attention(token, _view(keys, *runs[0]), _view(values, *runs[0]), scale=scaling)
    found = [_with_sums(token, _view(keys, *run), _view(values, *run), scale=scaling) for run in runs]
    sums = torch.stack([one[1] for one in found])
    weights = sums.softmax(dim=0).unsqueeze(-1)
    return (torch.stack([one[0] for one in found]) * weights).sum(dim=0).to(token.dtype)


def _part(
    query: torch.Tensor,
    runs: Runs,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """(tokens, heads, size)."""
    its_keys, its_values = _gather(keys, runs), _gather(values, runs)
    if query.device.type != "cpu" and mask is not None:
        # With both a mask and shared heads, kernels of devices fall back to the slowest.
        shared = query.shape[1] // its_keys.shape[1]
        its_keys, its_values = (one.repeat_interleave(shared, dim=1) for one in (its_keys, its_values))
    shares = query.shape[1] != its_keys.shape[1]
    found = _attention(
        query, its_keys, its_values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shares
    )
    return found[0].transpose(0, 1)


def _by_tables(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel for block tables takes it."""
    size = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = size == keys.shape[2] == values.shape[2] and size <= _HEAD_SIZE_MAX and size % 8 == 0
    return _TABLES and query.device.type == "cuda" and half and fits


def _varlen(
    passed: PagedPass,
    plan: _Plan,
    tokens: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    ends, lengths, tables = plan.tensors
    paged = (-1, passed.block_tokens)
    found: torch.Tensor = varlen_attn(
        tokens.contiguous(),
        keys.unflatten(0, paged),
        values.unflatten(0, paged),
        ends,
        None,
        max(passed.counts),
        max(passed.lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=tokens.shape[1] != keys.shape[1],
        seqused_k=lengths,
        block_table=tables,
    )
    return found


def _view(pool: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """A run, (1, heads, tokens, size), in place."""
    return pool[begin:end].transpose(0, 1).unsqueeze(0)


def _gather(pool: torch.Tensor, runs: Runs) -> torch.Tensor:
    """All of a row, (1, heads, tokens, size): in place if it is one run."""
    if len(runs) == 1:
        return _view(pool, *runs[0])
    return torch.cat([pool[begin:end] for begin, end in runs]).transpose(0, 1).unsqueeze(0)
