"""A pass of one token per row over buffers that never move, so that what is computed of it can be recorded once and played again.

Nothing here asks for a value on the host: lengths and tables are read by the device when it gets there.
"""

from __future__ import annotations

import torch

from zfabric.backends.hf_transformers.cache.paged_attention import Pool, by_tables, varlen
from zfabric.backends.hf_transformers.cache.scored_attention import Scoring, scored_attention


class StaticPass:
    """Where the rows of such a pass lie.

    Args:
        lengths: Of each row afterwards, (rows,), int32.
        tables: Blocks of each, (rows, width), int32; what lies behind a row's length is not looked at.
        ends: Numbers from 0 to the number of rows, int32.
        places: Numbers of the places in so many blocks, (width * tokens of a block,), int32.
    """

    def __init__(self, lengths: torch.Tensor, tables: torch.Tensor, ends: torch.Tensor, places: torch.Tensor) -> None:
        self._lengths, self._tables, self._ends, self._places = lengths, tables, ends, places
        self._hidden: dict[int | None, torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        pool: Pool,
        scaling: float | None,
        window: int | None,
        scoring: Scoring | None = None,
    ) -> torch.Tensor:
        """Arguments and result as of `paged_attention.attend`."""
        rows, longest = len(self._lengths), len(self._places)
        tokens = query.transpose(1, 2)
        if scoring is None and by_tables(query, pool):
            found = varlen(tokens[0], pool, (self._ends, self._lengths, self._tables), 1, longest, scaling, window)
            return found.unsqueeze(0)
        grouped = tokens.reshape(rows, pool.heads, -1, pool.size)
        keys, values = pool.side_by_side(self._tables.flatten(), rows)
        hidden = self._added(window, query.dtype)
        if scoring is not None:
            queries = tokens[0].unsqueeze(2)
            return scored_attention(queries, keys, values, hidden, scaling, scoring).transpose(0, 1)
        output = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=hidden, scale=scaling
        )
        return output.reshape(1, rows, -1, pool.value_size)

    def _added(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of all places, (rows, 1, 1, places); made once for all layers that are alike."""
        found = self._hidden.get(window)
        if found is None:
            ends = self._lengths.unsqueeze(1)
            hidden = self._places >= ends
            if window is not None:
                hidden |= self._places < ends - window
            found = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            found = self._hidden[window] = found.masked_fill_(hidden, float("-inf")).view(len(ends), 1, 1, -1)
        return found
