"""The running batch: a left-padded key-value cache that sequences join and leave between two steps.

Left padding keeps every row's newest token in the last column, so one step appends one column for all. A row that joins
is padded to the batch's length, or the batch to the row's; columns that no row uses any more are cut off when rows leave.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import torch
from transformers import DynamicCache

from zfabric.backends.hf_transformers.sequence import Sequence


class Batch:
    """Rows, their cache, and the forward pass of one step.

    Args:
        model: A causal language model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.device
        self.rows: list[Sequence] = []
        self._tokens: list[int] = []
        self._cache: Any = None
        self._mask = torch.empty(0)
        self._lengths = torch.empty(0)

    @property
    def cached_tokens(self) -> int:
        """Cells of the cache in use, padding included."""
        return int(self._mask.shape[0] * self._mask.shape[1]) if self.rows else 0

    def join(self, rows: Many[Sequence], cache: Any, length: int, tokens: Many[int]) -> None:
        """Add rows that share one prefilled prompt.

        Args:
            cache: The prompt's cache, of one row and `length` columns.
            tokens: The token that each row is to be fed next.
        """
        count = len(rows)
        if count > 1:
            cache.batch_repeat_interleave(count)
        mask = torch.ones((count, length), dtype=torch.long, device=self._device)
        lengths = torch.full((count,), length, dtype=torch.long, device=self._device)
        if not self.rows:
            self._cache, self._mask, self._lengths = cache, mask, lengths
        else:
            columns = self._mask.shape[1]
            width = max(columns, length)
            for mine, other in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_pad(mine.keys, width), _pad(other.keys, width)])
                mine.values = torch.cat([_pad(mine.values, width), _pad(other.values, width)])
            self._mask = torch.cat([_pad_mask(self._mask, width), _pad_mask(mask, width)])
            self._lengths = torch.cat([self._lengths, lengths])
        self.rows.extend(rows)
        self._tokens.extend(tokens)

    def leave(self, keep: list[int]) -> None:
        """Go on with these rows only."""
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in keep]
        self._tokens = [self._tokens[index] for index in keep]
        if not keep:
            self._cache = None
            self._mask = self._lengths = torch.empty(0)
            return
        chosen = torch.tensor(keep, device=self._device)
        self._mask = self._mask[chosen]
        self._lengths = self._lengths[chosen]
        unused = int(self._mask.shape[1] - self._lengths.max())
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, unused:]
            layer.values = layer.values[chosen, :, unused:]
        self._mask = self._mask[:, unused:]

    def clear(self) -> list[Sequence]:
        """Forget all rows; returns them."""
        rows = self.rows
        self.leave([])
        return rows

    def forward(self) -> torch.Tensor:
        """Feed each row its token. Returns float32 logits (rows, vocabulary)."""
        ones = torch.ones((len(self.rows), 1), dtype=torch.long, device=self._device)
        mask = torch.cat([self._mask, ones], dim=1)
        tokens = torch.tensor(self._tokens, dtype=torch.long)
        if self._device.type == "cuda":
            tokens = tokens.pin_memory()
        output = self._model(
            input_ids=tokens.to(self._device, non_blocking=True).unsqueeze(1),
            attention_mask=mask,
            position_ids=self._lengths.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        # Only now: a step that failed for want of memory can be tried again with fewer rows.
        self._mask = mask
        self._lengths = self._lengths + 1
        return output.logits[:, -1].float()

    def feed(self, tokens: Many[int]) -> None:
        """The tokens that were drawn, to be fed in the next step."""
        self._tokens = list(tokens)

    def repair(self) -> None:
        """After a failed step: cut what some layers had appended already."""
        columns = self._mask.shape[1]
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, :columns]
            layer.values = layer.values[:, :, :columns]


class Prefill:
    """A prompt on its way into the batch, some tokens at a time.

    Args:
        model: As of `Batch`.
        rows: The choices that will start from it.
        tokens: The prompt, and what a continued answer has already.
    """

    def __init__(self, model: Any, rows: list[Sequence], tokens: list[int]) -> None:
        self._model = model
        self.rows = rows
        self.tokens = tokens
        self.done = 0
        self.cache: Any = DynamicCache()

    def advance(self, count_max: int, *, all_logits: bool) -> torch.Tensor:
        """Compute up to so many tokens. Returns float32 logits of them all, or of the last: (positions, vocabulary)."""
        part = self.tokens[self.done : self.done + count_max]
        device = self._model.device
        positions = torch.arange(self.done, self.done + len(part), device=device).unsqueeze(0)
        output = self._model(
            input_ids=torch.tensor([part], device=device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        self.done += len(part)
        return output.logits[0].float()

    @property
    def left(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.done


def _pad(values: torch.Tensor, width: int) -> torch.Tensor:
    """Pad (rows, heads, columns, size) on the left of its columns."""
    return torch.nn.functional.pad(values, (0, 0, width - values.shape[2], 0))


def _pad_mask(mask: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
