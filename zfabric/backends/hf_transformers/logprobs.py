"""Log-probabilities of drawn tokens and of prompts, by the model itself: before temperature and all else."""

from __future__ import annotations

from typing import Any

import torch

from zfabric.wire.payloads import Logprob, TokenLogprobs


def token_logprobs(logits: torch.Tensor, token: int, count: int, tokenizer: Any) -> TokenLogprobs:
    """One token's entry.

    Args:
        logits: (vocabulary,), unprocessed.
        count: Alternatives beside it.
    """
    logp = logits.log_softmax(dim=-1)
    own = logp[token]
    rank = int((logp > own).sum()) + 1
    top: list[Logprob] = []
    if count:
        values, tokens = logp.topk(min(count, logp.shape[0]))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        top = [_entry(other, value, tokenizer, place + 1) for place, (other, value) in enumerate(pairs)]
    return TokenLogprobs(_entry(token, float(own), tokenizer, rank), top)


def prompt_logprobs(
    logits: torch.Tensor, tokens: list[int], begin: int, count: int, tokenizer: Any
) -> list[TokenLogprobs | None]:
    """Entries of the prompt tokens that a chunk predicts; the very first token has none.

    Args:
        logits: (positions, vocabulary) of tokens[begin:begin + positions].
    """
    entries: list[TokenLogprobs | None] = [None] if begin == 0 else []
    for offset in range(logits.shape[0]):
        following = begin + offset + 1
        if following < len(tokens):
            entries.append(token_logprobs(logits[offset], tokens[following], count, tokenizer))
    return entries


def _entry(token: int, value: float, tokenizer: Any, rank: int) -> Logprob:
    return Logprob(token, value, str(tokenizer.decode([token])), rank)
