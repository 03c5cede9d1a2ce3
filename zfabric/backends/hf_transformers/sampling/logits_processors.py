"""What changes the logits of a batch before the draw: penalties, biases, bans and guides, each for all rows at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on
from zfabric.backends.hf_transformers.sampling.guide_masks import GuideMasks
from zfabric.backends.hf_transformers.sampling.token_histories import Penalties, TokenHistories

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
        self._phased = [index for index, row in enumerate(rows) if row.params.min_new_tokens or row.suppressed[1]]
        self._phases: list[tuple[bool, bool]] = []
        self._bans: Entries | None = None
        self._pinned = [index for index, row in enumerate(rows) if row.forced]
        self._pins: list[tuple[int, frozenset[int]]] = []
        self._forced: Entries | None = None
        self._worded = [index for index, row in enumerate(rows) if any(len(word) > 1 for word in row.bad_words)]
        biases = [row.params.logit_bias or {} for row in rows]
        self._biased = _entries(device, biases)
        if self._biased is not None:
            values = [bias for its in biases for bias in its.values()]
            self._biases = tensor_on(device, values, torch.float32)
        self._allowed = _entries(device, [row.allowed for row in rows])
        if self._allowed is not None:
            self._restricted = tensor_on(device, [index for index, row in enumerate(rows) if row.allowed])
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
        banned = [row.suppressed[0].union(word[0] for word in row.bad_words if len(word) == 1) for row in self._rows]
        for index, (short, begins) in zip(self._phased, self._phases, strict=True):
            row = self._rows[index]
            banned[index] |= (row.end_tokens if short else frozenset()) | (row.suppressed[1] if begins else frozenset())
        self._bans = _entries(self._device, [sorted(tokens) for tokens in banned])

    def _force(self, positions: Sequence[int]) -> None:
        """Tokens that come at these positions whatever the model says."""
        pins = [(index, its) for index in self._pinned if (its := self._rows[index].forced.get(positions[index]))]
        if pins != self._pins:
            self._pins = pins
            found = dict(pins)
            self._forced = _entries(self._device, [sorted(found.get(index, ())) for index in range(len(self._rows))])

    def _ban_words(self, scores: torch.Tensor) -> None:
        """The last tokens of words of which a row has all others."""
        banned: list[list[int]] = [[] for _ in self._rows]
        for index in self._worded:
            row = self._rows[index]
            for *start, last in row.bad_words:
                if start and row.output[-len(start) :] == start:
                    banned[index].append(last)
        entries = _entries(self._device, banned)
        if entries is not None:
            scores.index_put_(entries, self._off)


def process_logits(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Apply penalties, biases and bans of rows that are at the end of their output, in place; their histories are made anew.

    Args:
        scores: (rows, vocabulary).
    """
    if not all(row.plain for row in rows):
        histories = TokenHistories(scores.shape[1], scores.device)
        LogitsProcessors(rows, [len(row.output) for row in rows], histories).apply(scores)


def _entries(device: torch.device, tokens: Sequence[Iterable[int]]) -> Entries | None:
    """The entries of each row's tokens; None if no row has any."""
    pairs = [(index, token) for index, its in enumerate(tokens) for token in its]
    if not pairs:
        return None
    rows, columns = tensor_on(device, pairs).unbind(1)
    return rows, columns
