"""Drawing one token for each row of a batch, each by its own parameters.

Order, as in transformers: penalties and biases on the logits, then temperature, top-k, top-p, min-p, typical-p. A draw is
the inverse of the distribution function at a number that depends on the request's seed and the token's position alone:
the same seed draws the same text, whoever shares the batch, and a continuation needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from zfabric.wire.payloads import SamplingParams

_MASK64: Final = (1 << 64) - 1
_OFF: Final = float("-inf")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) by SplitMix64 (Steele, Lea, Flood 2014) of seed and position."""
    state = (seed * 0xD1B54A32D192ED03 + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


@dataclass(slots=True)
class Row:
    """What drawing needs to know of one sequence.

    Attributes:
        prompt: Its prompt's tokens.
        output: Tokens of its answer so far.
        end_tokens: Tokens that end it; masked before `min_new_tokens`.
        bad_words: Token sequences that must not appear.
    """

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    end_tokens: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    plain: bool = field(init=False)
    warps: bool = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.plain = not (
            p.repetition_penalty != 1.0
            or p.presence_penalty
            or p.frequency_penalty
            or p.logit_bias
            or p.min_new_tokens
            or self.bad_words
        )
        self.warps = p.top_k > 0 or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1


def draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """One token per row.

    Args:
        logits: Float tensor (rows, vocabulary); changed in place where rows have penalties.

    Returns:
        int64 tensor (rows,), on the device of the logits: one copy brings all of them to the host.
    """
    for index, row in enumerate(rows):
        if not row.plain:
            penalize(logits[index], row)
    greedy = [row.params.greedy for row in rows]
    if all(greedy):
        return logits.argmax(dim=-1)
    temperature = torch.tensor([1.0 if g else r.params.temperature for g, r in zip(greedy, rows, strict=True)])
    scores = logits / temperature.to(logits.device).unsqueeze(1)
    if any(row.warps for row in rows):
        warp(scores, rows)
    numbers = torch.tensor([uniform(row.seed, len(row.output)) for row in rows], dtype=torch.float64)
    drawn = _inverse(scores, numbers)
    if not any(greedy):
        return drawn
    return torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(dim=-1), drawn)


def penalize(scores: torch.Tensor, row: Row) -> None:
    """Apply penalties, bias and bans to one row (vocabulary,), in place."""
    p = row.params
    if p.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt, *row.output}), device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
    if row.output and (p.presence_penalty or p.frequency_penalty):
        tokens, counts = torch.tensor(row.output, device=scores.device).unique(return_counts=True)
        scores[tokens] -= p.presence_penalty + p.frequency_penalty * counts.to(scores.dtype)
    if p.logit_bias:
        biased = [token for token in p.logit_bias if 0 <= token < scores.shape[0]]
        scores[biased] += torch.tensor([p.logit_bias[t] for t in biased], dtype=scores.dtype, device=scores.device)
    if len(row.output) < p.min_new_tokens and row.end_tokens:
        scores[sorted(row.end_tokens)] = _OFF
    for *start, last in row.bad_words:
        if not start or row.output[-len(start) :] == start:
            scores[last] = _OFF


def warp(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Apply top-k, top-p, min-p and typical-p to (rows, vocabulary), in place: what falls out becomes -inf."""
    indexes = [index for index, row in enumerate(rows) if row.warps]
    part = scores[indexes]
    params = [rows[index].params for index in indexes]
    ordered, order = part.sort(dim=-1, descending=True, stable=True)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=part.dtype, device=part.device).unsqueeze(1)

    size = part.shape[1]
    ranks = torch.arange(size, device=part.device).unsqueeze(0)
    ordered.masked_fill_(ranks >= column([p.top_k if p.top_k > 0 else size for p in params]), _OFF)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    before = mass - ordered.softmax(dim=-1)
    # The likeliest token always stays, whatever the bound.
    beyond = (before >= column([p.top_p for p in params])) & (ranks > 0)
    ordered.masked_fill_(beyond & column([float(p.top_p < 1) for p in params]).bool(), _OFF)
    probabilities = ordered.softmax(dim=-1)
    ordered.masked_fill_(probabilities < probabilities[:, :1] * column([p.min_p for p in params]), _OFF)
    part.scatter_(1, order, ordered)
    for position, p in enumerate(params):
        if p.typical_p < 1:
            _typical(part[position], p.typical_p)
    scores[indexes] = part


def _typical(scores: torch.Tensor, mass: float) -> None:
    """Keep the tokens whose surprise is nearest to the expected one, up to a mass (Meister et al. 2022)."""
    logp = scores.log_softmax(dim=-1)
    probabilities = logp.exp()
    entropy = -(probabilities * logp.nan_to_num(neginf=0.0)).sum()
    order = (-logp - entropy).abs().argsort(stable=True)
    cumulative = probabilities[order].cumsum(dim=-1)
    keep = max(1, int((cumulative < mass).sum()) + 1)
    scores[order[keep:]] = _OFF


def _inverse(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token at which each row's distribution function passes its number."""
    cumulative = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    targets = numbers.to(scores.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)
