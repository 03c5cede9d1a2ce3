"""What changes a row's logits before the draw: penalties, biases and bans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.structured_outputs import Guide
from zfabric.wire.sampling import SamplingParams

OFF: Final = float("-inf")
#: Drawn where all tokens are banned.
NOTHING: Final = -1


class History:
    """Which tokens a sequence has, on the device; brought up to date by the tokens drawn since, not made anew.

    Attributes:
        seen: Tokens of prompt and answer, each once.
        drawn, counts: Tokens of the answer, each once, and how often it came.
    """

    __slots__ = ("_known", "_places", "_taken", "counts", "drawn", "seen")

    def __init__(self, prompt: list[int], device: Any) -> None:
        self._known = set(prompt)
        self._places: dict[int, int] = {}
        self._taken = 0
        self.seen = torch.tensor(sorted(self._known), dtype=torch.long, device=device)
        self.drawn = torch.empty(0, dtype=torch.long, device=device)
        self.counts = torch.empty(0, device=device)

    def follow(self, output: list[int]) -> None:
        """Enter what the answer has gained."""
        for token in output[self._taken :]:
            place = self._places.setdefault(token, len(self._places))
            if place == self.drawn.shape[0]:
                self.drawn = torch.cat([self.drawn, self.drawn.new_tensor([token])])
                self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])
            self.counts[place] += 1
            if token not in self._known:
                self._known.add(token)
                self.seen = torch.cat([self.seen, self.seen.new_tensor([token])])
        self._taken = len(output)


@dataclass(slots=True)
class Row:
    """What drawing needs to know of one sequence.

    Attributes:
        prompt: Its prompt's tokens.
        output: Tokens of its answer so far.
        end_tokens: Tokens that end it; masked before `min_new_tokens`.
        bad_words: Token sequences that must not appear.
        guide: What the text has to follow.
        suppressed: Tokens that the model is never to draw, and those that are not to begin an answer.
        allowed: The only tokens that may be drawn; empty for all of them.
        independent: Whether its draws depend on logits, seed and position alone, not on which tokens the answer has.
    """

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    end_tokens: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    guide: Guide | None = None
    suppressed: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    allowed: tuple[int, ...] = ()
    plain: bool = field(init=False)
    independent: bool = field(init=False)
    warps: bool = field(init=False)
    history: History | None = field(init=False, default=None)
    _others: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        p = self.params
        self.plain = not (
            p.repetition_penalty != 1.0
            or p.presence_penalty
            or p.frequency_penalty
            or p.logit_bias
            or p.min_new_tokens
            or self.bad_words
            or self.guide is not None
            or any(self.suppressed)
            or self.allowed
        )
        self.independent = not (
            p.repetition_penalty != 1.0
            or p.presence_penalty
            or p.frequency_penalty
            or any(len(word) > 1 for word in self.bad_words)
            or self.guide is not None
        )
        self.warps = p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1

    def others(self, scores: torch.Tensor) -> torch.Tensor:
        """Which tokens are not allowed, as a mask of these scores."""
        if self._others is None:
            mask = torch.ones_like(scores, dtype=torch.bool)
            mask[torch.tensor(self.allowed, dtype=torch.long, device=scores.device)] = False
            self._others = mask
        return self._others


def process_logits(scores: torch.Tensor, row: Row, ahead: int = 0) -> None:
    """Apply penalties, bias and bans to one row (vocabulary,), in place.

    Args:
        ahead: Tokens between the answer's end and the draw.
    """
    p = row.params
    position = len(row.output) + ahead
    if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty:
        _penalize_repeats(scores, row)
    if p.logit_bias:
        biased = torch.tensor(list(p.logit_bias), dtype=torch.long, device=scores.device)
        scores[biased] += torch.tensor(list(p.logit_bias.values()), dtype=scores.dtype, device=scores.device)
    banned = set(row.suppressed[0])
    if position < p.min_new_tokens:
        banned |= row.end_tokens
    if not position:
        banned |= row.suppressed[1]
    for *start, last in row.bad_words:
        if not start or row.output[-len(start) :] == start:
            banned.add(last)
    if banned:
        scores[torch.tensor(sorted(banned), dtype=torch.long, device=scores.device)] = OFF
    if row.allowed:
        scores.masked_fill_(row.others(scores), OFF)
    if row.guide is not None:
        row.guide.ban(scores)


def _penalize_repeats(scores: torch.Tensor, row: Row) -> None:
    p = row.params
    history = row.history
    if history is None:
        history = row.history = History(row.prompt, scores.device)
    history.follow(row.output)
    if p.repetition_penalty != 1.0:
        values = scores[history.seen]
        scores[history.seen] = torch.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        scores[history.drawn] -= p.presence_penalty + p.frequency_penalty * history.counts
