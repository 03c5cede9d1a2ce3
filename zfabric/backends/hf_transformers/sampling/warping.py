"""Draws among the candidates that top-k, top-p, min-p and typical-p leave, and draws among all."""

from __future__ import annotations

from typing import Final

import torch

from zfabric.backends.hf_transformers.sampling.logits_processors import OFF
from zfabric.backends.hf_transformers.sampling.sampling_metadata import Warpers

#: On a CPU, ordering a whole vocabulary costs more than a small model's step. So many of the likeliest nearly always do.
_CANDIDATES: Final = 256
#: Of a top-k that a device is not to order the vocabulary for.
_BOUND_MAX: Final = 1_024


def inverse(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The place at which each row's distribution function passes its number.

    Args:
        scores: (rows, candidates); -inf for what is none.
        numbers: Of `random_numbers.uniform`, (rows,).

    Returns:
        int64 (rows,).
    """
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = numbers.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)


def pick(scores: torch.Tensor, warpers: Warpers, numbers: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Draw among the candidates that are left.

    Args:
        scores: (rows, vocabulary), after temperature.
        width: Order so many candidates first, and all of a row only if these cannot be enough; by default few on a CPU.
            To know it the host waits, so on a device all are ordered, unless each row has a top-k that is small.

    Returns:
        int64 (rows,).
    """
    size = scores.shape[1]
    if width is None:
        on_cpu = scores.device.type == "cpu"
        if not on_cpu and warpers.most is not None and warpers.most <= min(_BOUND_MAX, size):
            return pick_bounded(scores, warpers, numbers, warpers.most)
        width = _CANDIDATES if on_cpu and size > 4 * _CANDIDATES else size
    values, tokens = _ordered(scores, width)
    kept = truncate(values, scores, warpers)
    picked = tokens.gather(1, inverse(keep_typical(kept, warpers), numbers).unsqueeze(1)).squeeze(1)
    if width < size:
        # A row is settled if all it keeps is likelier than the last candidate: nothing outside could be kept, and
        # among equals the order does not depend on how many candidates there are. The mass of top-k has to be known.
        counts = kept.isfinite().sum(dim=-1, keepdim=True).clamp_(min=1)
        unsettled = (values.gather(1, counts - 1).squeeze(1) <= values[:, -1]).tolist()
        again = [index for index, p in enumerate(warpers.params) if unsettled[index] or p.top_k > width]
        if again:
            some = Warpers.made([warpers.params[index] for index in again], scores.device)
            picked[again] = pick(scores[again], some, numbers[again], size)
    return picked


def pick_bounded(scores: torch.Tensor, warpers: Warpers, numbers: torch.Tensor, most: int) -> torch.Tensor:
    """The same of rows that have no more candidates than so many, without waiting for the device.

    Which of equal tokens `topk` finds is open, but not which values. So the draw is among values, and its token is found among
    all that have its value: the lower ones come first, as in an order of the whole vocabulary. On a CPU that takes up to twice
    the time of `pick`, which can look at the values.
    """
    values = scores.topk(most, dim=-1).values
    kept = keep_typical(truncate(values, scores, warpers), warpers)
    place = inverse(kept, numbers).unsqueeze(1)
    value = values.gather(1, place)
    place -= (values > value).sum(dim=-1, keepdim=True)
    alike = (scores == value).cumsum(dim=-1)
    return torch.searchsorted(alike, place + 1).squeeze(1).clamp_(max=scores.shape[1] - 1)


def _ordered(scores: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest so many, in falling order; among equals the lower token first. Returns values and tokens."""
    if width == scores.shape[1]:
        values, tokens = scores.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    tokens = scores.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def truncate(values: torch.Tensor, scores: torch.Tensor, warpers: Warpers) -> torch.Tensor:
    """Apply top-k, top-p and min-p.

    Args:
        values: Scores in falling order, (rows, candidates).
        scores: All of them, (rows, vocabulary).

    Returns:
        The values, -inf for what falls out.
    """
    ranks = torch.arange(values.shape[1], device=values.device).unsqueeze(0)
    kept = values
    if warpers.top_k is not None:
        kept = kept.masked_fill(ranks >= warpers.top_k, OFF)
    if warpers.top_p is not None:
        share = (kept - _total(kept, scores, warpers)).exp()
        before = share.cumsum(dim=-1) - share
        # The likeliest token always stays, whatever the bound.
        kept = kept.masked_fill((before >= warpers.top_p) & (ranks > 0), OFF)
    if warpers.min_p is not None:
        kept = kept.masked_fill((kept - kept[:, :1]).exp() < warpers.min_p, OFF)
    return kept


def _total(kept: torch.Tensor, scores: torch.Tensor, warpers: Warpers) -> torch.Tensor:
    """log of the mass of which top-p is a share, (rows, 1): what top-k leaves, or all."""
    if warpers.limited is None:
        return scores.logsumexp(dim=-1, keepdim=True)
    left = kept.logsumexp(dim=-1, keepdim=True)
    if warpers.most is not None:
        return left
    return torch.where(warpers.limited, left, scores.logsumexp(dim=-1, keepdim=True))


def keep_typical(kept: torch.Tensor, warpers: Warpers) -> torch.Tensor:
    """Apply typical-p to what the others left of candidates, in the same form."""
    if warpers.typical_p is None:
        return kept
    if warpers.typical is None:
        return _typical(kept, warpers.typical_p)
    some = _typical(kept.index_select(0, warpers.typical), warpers.typical_p)
    return kept.index_copy(0, warpers.typical, some)


def _typical(scores: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the expected one, up to a mass (Meister et al. 2022)."""
    logp = scores.log_softmax(dim=-1)
    shares = logp.exp()
    entropy = -(shares * logp.nan_to_num(neginf=0.0)).sum(dim=-1, keepdim=True)
    order = (-logp - entropy).abs().sort(dim=-1, stable=True).indices
    ordered = shares.gather(1, order)
    before = ordered.cumsum(dim=-1) - ordered
    ranks = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0)
    beyond = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, (before >= masses) & (ranks > 0))
    return scores.masked_fill(beyond, OFF)
