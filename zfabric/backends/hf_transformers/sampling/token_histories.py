"""Which tokens texts have, kept on the device, where they go on with what is drawn there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from zfabric.backends.hf_transformers.request.row import History, Row
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on

#: Columns that a history has room for when it is made, beyond what it begins with.
_HEADROOM: Final = 64
_SLOTS: Final = 4
#: Position of a history that is being written. If that fails, for want of memory say, it is made anew.
UNKNOWN: Final = -1


class TokenHistories:
    """Which tokens texts have, and how often.

    Args:
        vocabulary_size: Tokens from there on are none that logits tell of.
        device: Of the logits.

    Attributes:
        tokens: int64 (slots, columns). A row's columns behind its last repeat its first, so that whoever reads all columns
            meets no token that the row lacks.
        counts: int32 (slots, vocabulary), how often the answer has each token; None until somebody asks for it.
    """

    def __init__(self, vocabulary_size: int, device: torch.device) -> None:
        self.vocabulary_size, self.device = vocabulary_size, device
        self.tokens = torch.zeros((0, 0), dtype=torch.long, device=device)
        self.counts: torch.Tensor | None = None
        self._free: list[int] = []

    def has(self, row: Row, position: int) -> bool:
        """Whether a row's history is here, with so many tokens of its answer."""
        history = row.history
        return history is not None and history.free is self._free and history.position == position

    def enter(self, rows: Sequence[Row]) -> None:
        """Make histories of what the host knows of these."""
        known = []
        for row in rows:
            if row.history is None or row.history.free is not self._free:
                row.history = History(self._slot(), self._free)
            # What counts the answer alone needs one other token, to fill its columns.
            before = dict.fromkeys(row.prompt) if row.params.repetition_penalty != 1.0 else row.prompt[:1]
            tokens = [token for token in (*before, *row.output) if token < self.vocabulary_size]
            row.history.position = UNKNOWN
            known.append(tokens)
        width = max(map(len, known))
        self.widen(width)
        slots = tensor_on(self.device, [row.history.slot for row in rows if row.history is not None])
        padded = [tokens + (tokens[:1] or [0]) * (width + 1 - len(tokens)) for tokens in known]
        filled = tensor_on(self.device, padded)
        self.tokens[slots] = filled[:, -1:] if width == 0 else filled[:, :1].expand(-1, self.tokens.shape[1])
        self.tokens[slots, :width] = filled[:, :width]
        if any(row.counts_tokens for row in rows):
            self._count(rows, slots)
        for row, tokens in zip(rows, known, strict=True):
            assert row.history is not None
            row.history.length, row.history.position = len(tokens), len(row.output)

    def widen(self, width: int) -> None:
        """Have so many columns at least."""
        missing = width - self.tokens.shape[1]
        if missing > 0:
            missing += max(_HEADROOM, self.tokens.shape[1])
            first = self.tokens[:, :1] if self.tokens.shape[1] else self.tokens.new_zeros((self.tokens.shape[0], 1))
            self.tokens = torch.cat([self.tokens, first.expand(-1, missing)], dim=1)

    def _slot(self) -> int:
        if not self._free:
            present = self.tokens.shape[0]
            added = max(_SLOTS, present)
            self.tokens = torch.cat([self.tokens, self.tokens.new_zeros((added, self.tokens.shape[1]))])
            if self.counts is not None:
                self.counts = torch.cat([self.counts, self.counts.new_zeros((added, self.vocabulary_size))])
            self._free.extend(range(present + added - 1, present - 1, -1))
        return self._free.pop()

    def _count(self, rows: Sequence[Row], slots: torch.Tensor) -> None:
        if self.counts is None:
            shape = (self.tokens.shape[0], self.vocabulary_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        else:
            self.counts.index_fill_(0, slots, 0)
        pairs = [(row.history.slot, token) for row in rows if row.history is not None for token in row.output]
        if pairs:
            places = tensor_on(self.device, pairs)
            once = torch.ones(len(pairs), dtype=torch.int32, device=self.device)
            self.counts.index_put_((places[:, 0], places[:, 1]), once, accumulate=True)
