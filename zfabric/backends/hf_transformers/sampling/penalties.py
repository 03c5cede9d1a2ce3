"""Penalties on tokens that a text has, over histories that are on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on
from zfabric.backends.hf_transformers.sampling.row_lines import lines_on
from zfabric.backends.hf_transformers.sampling.token_histories import UNKNOWN, TokenHistories


class Penalties:
    """Repetition, presence and frequency penalties of the rows of a batch that have them.

    Args:
        places: Which rows of the logits these are.
        positions: Tokens of their answers that are drawn, be they on the host or not.
        histories: Of the logits' device and vocabulary.
    """

    def __init__(
        self, rows: Sequence[Row], places: Sequence[int], positions: Sequence[int], histories: TokenHistories
    ) -> None:
        self._rows, self._histories = rows, histories
        stale = [row for row, position in zip(rows, positions, strict=True) if not histories.has(row, position)]
        if stale:
            histories.enter(stale)
        known = self._known = [row.history for row in rows if row.history is not None]
        assert [history.position for history in known] == list(positions), "a history ends where its draw begins"
        #: Of texts without tokens, until they have one.
        empty = [place for place, history in enumerate(known) if not history.length]
        slots, lengths = [history.slot for history in known], [history.length for history in known]
        lines = lines_on(histories.device, rows, places, slots, lengths)
        self._places, self._slots, self._lengths = lines.own(0), lines.own(1), lines.own(2)
        self._repetition, self._presence, self._frequency = lines.penalties
        if empty:
            self._empty = tensor_on(histories.device, empty)
        self._any_empty = bool(empty)
        self._repeats = any(row.params.repetition_penalty != 1.0 for row in rows)
        self._counts = any(row.counts_tokens for row in rows)

    def holds(self, positions: Sequence[int]) -> bool:
        """Whether its histories are those of rows that have so many tokens."""
        return all(map(self._histories.has, self._rows, positions))

    def apply(self, scores: torch.Tensor) -> None:
        """Penalize tokens, in place; a token that came several times is computed as often, to the same value."""
        width = max(history.length for history in self._known)
        if not width:
            return
        tokens = self._histories.tokens[:, :width].index_select(0, self._slots)
        places = self._places.unsqueeze(1)
        values = scores[places, tokens]
        if self._repeats:
            repetition = self._repetition
            if self._any_empty:
                # What these have in place of tokens is none of theirs.
                repetition = repetition.index_fill(0, self._empty, 1.0)
            values = torch.where(values < 0, values * repetition, values / repetition)
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
            history.position = UNKNOWN
        self._write(drawn.index_select(0, self._places))
        for history, position in zip(self._known, positions, strict=True):
            history.length += 1
            history.position = position + 1

    def _write(self, tokens: torch.Tensor) -> None:
        histories = self._histories
        histories.widen(1 + max(history.length for history in self._known))
        if self._any_empty:
            first = tokens.index_select(0, self._empty).unsqueeze(1).expand(-1, histories.tokens.shape[1])
            histories.tokens.index_copy_(0, self._slots.index_select(0, self._empty), first)
            self._any_empty = False
        histories.tokens[self._slots, self._lengths] = tokens
        if self._counts:
            assert histories.counts is not None
            histories.counts[self._slots, tokens] += 1
        self._lengths += 1
