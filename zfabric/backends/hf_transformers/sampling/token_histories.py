"""Penalties on tokens that a text has, over histories that are kept on the device and go on with what is drawn there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from zfabric.backends.hf_transformers.request.row import History, Row
from zfabric.backends.hf_transformers.sampling.device_tensors import column_on, tensor_on

#: Columns that a history has room for when it is made, beyond what it begins with.
_HEADROOM: Final = 64
_SLOTS: Final = 4
#: Position of a history that is being written. If that fails, for want of memory say, it is made anew.
_UNKNOWN: Final = -1


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
        return (
            history is not None and history.free is self._free and history.position == position and history.length > 0
        )

    def enter(self, rows: Sequence[Row]) -> None:
        """Make histories of what the host knows of these."""
        known = []
        for row in rows:
            if row.history is None or row.history.free is not self._free:
                row.history = History(self._slot(), self._free)
            # What counts the answer alone needs one other token, to fill its columns.
            before = dict.fromkeys(row.prompt) if row.params.repetition_penalty != 1.0 else row.prompt[:1]
            tokens = [token for token in (*before, *row.output) if token < self.vocabulary_size]
            row.history.position = _UNKNOWN
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


class Penalties:
    """Repetition, presence and frequency penalties of the rows of a batch that have them.

    Args:
        places: Which rows of the logits these are.
        positions: Tokens of their answers that are drawn, be they on the host or not.
    """

    def __init__(
        self, rows: Sequence[Row], places: Sequence[int], positions: Sequence[int], histories: TokenHistories
    ) -> None:
        self._rows, self._histories = rows, histories
        stale = [row for row, position in zip(rows, positions, strict=True) if not histories.has(row, position)]
        if stale:
            histories.enter(stale)
        self._known = [row.history for row in rows if row.history is not None]
        assert [history.position for history in self._known] == list(positions), "a history ends where its draw begins"
        device = histories.device
        self._places = tensor_on(device, places)
        self._slots = tensor_on(device, [history.slot for history in self._known])
        self._lengths = tensor_on(device, [history.length for history in self._known])
        params = [row.params for row in rows]
        self._repetition: torch.Tensor | None = None
        if any(p.repetition_penalty != 1.0 for p in params):
            pairs = zip(params, self._known, strict=True)
            self._repetition = column_on(device, [p.repetition_penalty if h.length else 1.0 for p, h in pairs])
        self._counts = any(row.counts_tokens for row in rows)
        if self._counts:
            self._presence = column_on(device, [p.presence_penalty for p in params])
            self._frequency = column_on(device, [p.frequency_penalty for p in params])

    def holds(self, positions: Sequence[int]) -> bool:
        """Whether its histories are those of rows that have so many tokens."""
        return all(map(self._histories.has, self._rows, positions))

    def apply(self, scores: torch.Tensor) -> None:
        """Penalize tokens, in place; a token that came several times is computed as often, to the same value."""
        width = max(history.length for history in self._known)
        tokens = self._histories.tokens[:, :width].index_select(0, self._slots)
        places = self._places.unsqueeze(1)
        values = scores[places, tokens]
        if self._repetition is not None:
            values = torch.where(values < 0, values * self._repetition, values / self._repetition)
        if self._counts:
            assert self._histories.counts is not None
            counts = self._histories.counts[self._slots.unsqueeze(1), tokens]
            values = values - ((counts > 0) * self._presence + counts * self._frequency)
        scores[places, tokens] = values

    def follow(self, drawn: torch.Tensor) -> None:
        """Enter what was drawn.

        Args:
            drawn: int64, a token for each row of the logits.
        """
        positions = [history.position for history in self._known]
        for history in self._known:
            history.position = _UNKNOWN
        self._write(drawn.index_select(0, self._places))
        for history, position in zip(self._known, positions, strict=True):
            history.length += 1
            history.position = position + 1

    def _write(self, tokens: torch.Tensor) -> None:
        histories = self._histories
        histories.widen(1 + max(history.length for history in self._known))
        histories.tokens[self._slots, self._lengths] = tokens
        if self._counts:
            assert histories.counts is not None
            histories.counts[self._slots, tokens] += 1
        self._lengths += 1
