"""What changes the logits of a batch before the draw: penalties, biases, bans and guides, each for all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on, tensors_on
from zfabric.backends.hf_transformers.sampling.guide_masks import GuideMasks
from zfabric.backends.hf_transformers.sampling.penalties import Penalties
from zfabric.backends.hf_transformers.sampling.row_lines import tokens_of, values_of
from zfabric.backends.hf_transformers.sampling.token_histories import TokenHistories

OFF: Final = float("-inf")
#: Drawn where all tokens are banned.
NOTHING: Final = -1

#: Rows and tokens of a sparse (rows, vocabulary), each int64 (entries,).
Entries = tuple[torch.Tensor, torch.Tensor]


class LogitsProcessors:
    """All that changes the logits of these rows, on their device; what it is made of stays from step to step.

    Words that are banned only after others are looked for on the host, which has to know the rows' newest tokens for it, as
    guides have to.

    Args:
        rows: Those of a batch.
        positions: Of the tokens that are drawn next.
        histories: Of the logits' device and vocabulary.
    """

    def __init__(self, rows: Sequence[Row], positions: Sequence[int], histories: TokenHistories) -> None:
        device = self._device = histories.device
        self._rows, self._histories = rows, histories
        self._off = torch.full((), OFF, device=device)
        self._penalized = [index for index, row in enumerate(rows) if row.penalized]
        self._penalties: Penalties | None = None
        self._banned = [index for index, row in enumerate(rows) if row.banned]
        self._phased = [index for index, row in enumerate(rows) if row.phased]
        self._phases: list[tuple[bool, bool]] = []
        self._bans: Entries | None = None
        self._pinned = [index for index, row in enumerate(rows) if row.forced]
        self._pins: list[tuple[int, frozenset[int]]] = []
        self._forced: Entries | None = None
        self._worded = [index for index, row in enumerate(rows) if row.worded]
        biased = [(index, row) for index, row in enumerate(rows) if row.params.logit_bias]
        self._biased = self._named(biased, "biased", _biased)
        if self._biased is not None:
            self._biases = torch.cat([values_of(row, device, "biases", _biases) for _, row in biased])
        allowed = [(index, row) for index, row in enumerate(rows) if row.allowed]
        self._allowed = self._named(allowed, "allowed", _allowed)
        if self._allowed is not None:
            self._restricted = tensor_on(device, [index for index, _ in allowed])
        guided = {index: row.guide for index, row in enumerate(rows) if row.guide is not None}
        self._guides = GuideMasks([*guided.values()], [*guided], len(rows), device) if guided else None
        self._ban(positions)
        self._force(positions)
        self._penalize(positions)

    def move(self, positions: Sequence[int]) -> None:
        """Be as the next draws need it, of the same rows."""
        if self._phased and self._phases_at(positions) != self._phases:
            self._ban(positions)
        self._force(positions)
        if self._penalties is not None and not self._penalties.holds([positions[index] for index in self._penalized]):
            self._penalize(positions)

    def apply(self, scores: torch.Tensor) -> None:
        """Change the logits of a step, (rows, vocabulary), in place."""
        if self._penalties is not None:
            self._penalties.apply(scores)
        if self._biased is not None:
            scores[self._biased] += self._biases
        if self._bans is not None:
            scores.index_put_(self._bans, self._off)
        if self._worded:
            self._ban_words(scores)
        if self._allowed is not None:
            values = scores[self._allowed]
            scores.index_fill_(0, self._restricted, OFF)
            scores[self._allowed] = values
        if self._guides is not None:
            self._guides.apply(scores)
        if self._forced is not None:
            scores.index_fill_(0, self._forced[0], OFF)
            scores[self._forced] = 0.0

    def follow(self, drawn: torch.Tensor) -> None:
        """Enter what was drawn, int64 (rows,)."""
        if self._penalties is not None:
            self._penalties.follow(drawn)

    def _penalize(self, positions: Sequence[int]) -> None:
        if self._penalized:
            rows = [self._rows[index] for index in self._penalized]
            at = [positions[index] for index in self._penalized]
            self._penalties = Penalties(rows, self._penalized, at, self._histories)

    def _phases_at(self, positions: Sequence[int]) -> list[tuple[bool, bool]]:
        """Of each row whose bans depend on the position: whether it may not end yet, and whether it begins: with its
        second token, where the first is forced."""
        return [
            (
                positions[index] < self._rows[index].params.min_new_tokens,
                positions[index] == int(0 in self._rows[index].forced),
            )
            for index in self._phased
        ]

    def _ban(self, positions: Sequence[int]) -> None:
        """The bans that hold whatever the answer has, or for its first tokens."""
        self._phases = self._phases_at(positions)
        its = [(index, self._tokens(index, "banned", _banned)) for index in self._banned]
        for index, (short, begins) in zip(self._phased, self._phases, strict=True):
            if short:
                its.append((index, self._tokens(index, "ends", _ends)))
            if begins:
                its.append((index, self._tokens(index, "suppressed first", _suppressed_first)))
        self._bans = _entries(self._device, its)

    def _force(self, positions: Sequence[int]) -> None:
        """Tokens that come at these positions whatever the model says."""
        pins = [(index, its) for index in self._pinned if (its := self._rows[index].forced.get(positions[index]))]
        if pins != self._pins:
            self._pins = pins
            self._forced = _entries(self._device, [(index, tensor_on(self._device, [*its])) for index, its in pins])

    def _tokens(self, index: int, use: str, named: Callable[[Row], Iterable[int]]) -> torch.Tensor:
        return tokens_of(self._rows[index], self._device, use, named)

    def _named(
        self, rows: Sequence[tuple[int, Row]], use: str, named: Callable[[Row], Iterable[int]]
    ) -> Entries | None:
        """The entries of tokens that these name, each row at its place."""
        return _entries(self._device, [(index, self._tokens(index, use, named)) for index, _ in rows])

    def _ban_words(self, scores: torch.Tensor) -> None:
        """The last tokens of words of which a row has all others."""
        pairs: list[tuple[int, int]] = []
        for index in self._worded:
            row = self._rows[index]
            for *start, last in row.bad_words:
                if start and row.output[-len(start) :] == start:
                    pairs.append((index, last))
        if pairs:
            scores.index_put_(tensor_on(self._device, pairs).unbind(1), self._off)


def process_logits(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Apply penalties, biases and bans of rows that are at the end of their output, in place; their histories are made anew.

    Args:
        scores: (rows, vocabulary).
    """
    if not all(row.plain for row in rows):
        histories = TokenHistories(scores.shape[1], scores.device)
        LogitsProcessors(rows, [len(row.output) for row in rows], histories).apply(scores)


def _entries(device: torch.device, tokens: Sequence[tuple[int, torch.Tensor]]) -> Entries | None:
    """The entries of rows' tokens, each with its place; None if there are none."""
    counts = [its.numel() for _, its in tokens]
    if not any(counts):
        return None
    rows, repeats = tensors_on(device, [[index for index, _ in tokens], counts])
    return rows.repeat_interleave(repeats, output_size=sum(counts)), torch.cat([its for _, its in tokens])


def _biased(row: Row) -> Iterable[int]:
    return row.params.logit_bias or ()


def _biases(row: Row) -> Iterable[float]:
    return (row.params.logit_bias or {}).values()


def _allowed(row: Row) -> Iterable[int]:
    return row.allowed


def _banned(row: Row) -> Iterable[int]:
    return row.banned


def _ends(row: Row) -> Iterable[int]:
    return row.end_tokens


def _suppressed_first(row: Row) -> Iterable[int]:
    return row.suppressed[1]
