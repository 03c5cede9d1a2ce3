"""The sampler: from the logits of a step to one token for each row, each by its own parameters, and its log-probabilities.

Order, as in transformers: penalties and biases on the logits, then temperature, top-k, top-p, min-p, typical-p. A draw is
the inverse of the distribution function at a number that depends on the request's seed and the token's position alone:
the same seed draws the same text, whoever shares the batch, and a continuation needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.logits_processors import NOTHING, OFF, Row, process_logits
from zfabric.backends.hf_transformers.logprobs import Entries, table
from zfabric.backends.hf_transformers.pending_draws import Drawn, PendingDraws
from zfabric.backends.hf_transformers.sequence import Sequence
from zfabric.wire.sampling import SamplingParams

_MASK64: Final = (1 << 64) - 1
#: On a CPU, ordering a whole vocabulary costs more than a small model's step. So many of the likeliest nearly always do.
_CANDIDATES: Final = 256


class Sampler:
    """Draws tokens, with what is told of them in one copy to the host.

    Args:
        tokenizer: For the texts of log-probabilities.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.entries = Entries(tokenizer)

    def sample(self, rows: list[Sequence], logits: torch.Tensor, ahead: Many[int] | None = None) -> list[Drawn]:
        """A token for each row, with its entry if one is wanted; see `sample_async`."""
        return self.sample_async(rows, logits, ahead).result()

    def sample_async(self, rows: list[Sequence], logits: torch.Tensor, ahead: Many[int] | None = None) -> PendingDraws:
        """Draw a token for each row, and begin to bring it to the host.

        Args:
            rows: May have a row several times, at different places, if it is `independent`.
            logits: (rows, vocabulary); changed in place.
            ahead: How many tokens beyond the end of its answer each row draws; 0 for all if None. Tokens between are none of
                the row's history.
        """
        lasts = [row.row for row in rows]
        counts = [row.alternatives for row in rows]
        wanted = [index for index, count in enumerate(counts) if count is not None]
        if not wanted:
            tokens = sample(logits, lasts, ahead)
            return PendingDraws(tokens, tokens, lambda numbers: [(token, None) for token in numbers])
        untouched = logits[wanted]
        tokens = sample(logits, lasts, ahead)
        lines = table(untouched, tokens[wanted].clamp(min=0), max(count or 0 for count in counts))
        packed = torch.cat([tokens.to(lines.dtype), lines.flatten()])

        def unpack(numbers: list[Any]) -> list[Drawn]:
            drawn: list[Drawn] = [(int(token), None) for token in numbers[: len(rows)]]
            for place, index in enumerate(wanted):
                begin = len(rows) + place * lines.shape[1]
                entry = self.entries.make(numbers[begin : begin + lines.shape[1]], counts[index] or 0)
                drawn[index] = (drawn[index][0], entry)
            return drawn

        return PendingDraws(tokens, packed, unpack)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) by SplitMix64 (Steele, Lea, Flood 2014) of seed and position.

    52 bits: times any positive double, it stays below that double.
    """
    state = (seed * 0xD1B54A32D192ED03 + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((state ^ (state >> 31)) >> 12) / (1 << 52)


def sample(logits: torch.Tensor, rows: Many[Row], ahead: Many[int] | None = None) -> torch.Tensor:
    """One token per row.

    Args:
        logits: Float tensor (rows, vocabulary); changed in place where rows have penalties.
        ahead: As of `Sampler.sample_async`.

    Returns:
        int64 tensor (rows,), on the device of the logits: one copy brings all of them to the host. NOTHING where all
        tokens of a row are banned.
    """
    ahead = ahead or [0] * len(rows)
    changed = [index for index, row in enumerate(rows) if not row.plain]
    for index in changed:
        process_logits(logits[index], rows[index], ahead[index])
    tokens = _sampled(logits, rows, [len(row.output) + further for row, further in zip(rows, ahead, strict=True)])
    if changed:
        tokens[changed] = tokens[changed].masked_fill(logits[changed].amax(dim=-1) == OFF, NOTHING)
    return tokens


def _sampled(logits: torch.Tensor, rows: Many[Row], positions: Many[int]) -> torch.Tensor:
    """What is drawn of logits that are final."""
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return logits.argmax(dim=-1)
    if len(drawn) == len(rows):
        return _draw(logits, rows, positions)
    tokens = logits.argmax(dim=-1)
    tokens[drawn] = _draw(logits[drawn], [rows[index] for index in drawn], [positions[index] for index in drawn])
    return tokens


def _draw(logits: torch.Tensor, rows: Many[Row], positions: Many[int]) -> torch.Tensor:
    """Draw for rows that are not greedy."""
    scores = logits / _column([row.params.temperature for row in rows], logits)
    drawn = [uniform(row.seed, position) for row, position in zip(rows, positions, strict=True)]
    numbers = torch.tensor(drawn, dtype=torch.float64, device=logits.device)
    warped = [index for index, row in enumerate(rows) if row.warps]
    if not warped:
        return _inverse(scores, numbers)
    size = scores.shape[1]
    width = _CANDIDATES if scores.device.type == "cpu" and size > 4 * _CANDIDATES else size
    if len(warped) == len(rows):
        return _pick(scores, [row.params for row in rows], numbers, width)
    plain = [index for index, row in enumerate(rows) if not row.warps]
    tokens = torch.empty(len(rows), dtype=torch.long, device=scores.device)
    tokens[plain] = _inverse(scores[plain], numbers[plain])
    tokens[warped] = _pick(scores[warped], [rows[index].params for index in warped], numbers[warped], width)
    return tokens


def _pick(scores: torch.Tensor, params: Many[SamplingParams], numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Draw among the candidates that top-k, top-p, min-p and typical-p leave."""
    values, tokens = _ordered(scores, width)
    kept, counts = keep(values, scores.logsumexp(dim=-1, keepdim=True), params)
    picked = tokens.gather(1, _inverse(kept, numbers).unsqueeze(1)).squeeze(1)
    if width < scores.shape[1]:
        # A row is settled if all it keeps is likelier than the last candidate: nothing outside could be kept, and
        # among equals the order does not depend on how many candidates there are. The mass of top-k has to be known.
        lowest = values.gather(1, counts.unsqueeze(1) - 1).squeeze(1)
        unsettled = (lowest <= values[:, -1]).tolist()
        again = [index for index, p in enumerate(params) if unsettled[index] or p.top_k > width]
        if again:
            some = [params[index] for index in again]
            picked[again] = _pick(scores[again], some, numbers[again], scores.shape[1])
    return picked


def _ordered(scores: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest so many, in falling order; among equals the lower token first. Returns values and tokens."""
    if width == scores.shape[1]:
        values, tokens = scores.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    tokens = scores.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def keep(values: torch.Tensor, total: torch.Tensor, params: Many[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, top-p, min-p and typical-p.

    Args:
        values: Scores in falling order, (rows, candidates).
        total: log of the sum of the exponentials of all scores, (rows, 1).

    Returns:
        The scores, -inf for what falls out; and how many were left before typical-p, (rows,).
    """
    size = values.shape[1]
    ranks = torch.arange(size, device=values.device).unsqueeze(0)
    limits = _column([p.top_k if p.top_k > 0 else size for p in params], values)
    kept = values.masked_fill(ranks >= limits, OFF)
    has_limit = _column([float(p.top_k > 0) for p in params], values).bool()
    share = (kept - torch.where(has_limit, kept.logsumexp(dim=-1, keepdim=True), total)).exp()
    before = share.cumsum(dim=-1) - share
    # The likeliest token always stays, whatever the bound; a bound of 1 cuts nothing off, whatever the rounding.
    bounds = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], values)
    kept = kept.masked_fill((before >= bounds) & (ranks > 0), OFF)
    relative = (kept - kept[:, :1]).exp()
    kept = kept.masked_fill(relative < _column([p.min_p for p in params], values), OFF)
    counts = kept.isfinite().sum(dim=-1).clamp_(min=1)
    typical = [index for index, p in enumerate(params) if p.typical_p < 1]
    if typical:
        masses = _column([params[index].typical_p for index in typical], values)
        kept[typical] = _typical(kept[typical], masses)
    return kept, counts


def _typical(scores: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, up to a mass (Meister et al. 2022)."""
    logp = scores.log_softmax(dim=-1)
    shares = logp.exp()
    entropy = -(shares * logp.nan_to_num(neginf=0.0)).sum(dim=-1, keepdim=True)
    order = (-logp - entropy).abs().sort(dim=-1, stable=True).indices
    before = shares.gather(1, order).cumsum(dim=-1) - shares.gather(1, order)
    ranks = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0)
    beyond = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, (before >= masses) & (ranks > 0))
    return scores.masked_fill(beyond, OFF)


def _inverse(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The place at which each row's distribution function passes its number."""
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = numbers.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _column(numbers: Many[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)
