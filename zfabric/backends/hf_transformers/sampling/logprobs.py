"""Log-probabilities of drawn tokens and of prompts, by the model itself: before temperature and all else."""

from __future__ import annotations

from typing import Any

import torch

from zfabric.wire.payloads import Logprob, TokenLogprobs


def table(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """All that entries are made of, in one tensor, so that one copy brings it to the host.

    Args:
        logits: (rows, vocabulary), unprocessed.
        tokens: (rows,), those whose probability is asked for.
        count: Alternatives.

    Returns:
        float64 (rows, 3 + 2 × count): token, its log-probability, its rank, the alternatives' tokens, theirs.
    """
    logp = logits.log_softmax(dim=-1)
    own = logp.gather(1, tokens.unsqueeze(1))
    rank = (logp > own).sum(dim=-1, keepdim=True) + 1
    values, others = logp.topk(min(count, logp.shape[1]), dim=-1)
    parts = [tokens.unsqueeze(1), own, rank, others, values]
    return torch.cat([part.to(torch.float64) for part in parts], dim=1)


class Entries:
    """Makes entries of a table's rows.

    Args:
        tokenizer: A transformers tokenizer. The text of each token is decoded once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def make(self, line: list[float], count: int) -> TokenLogprobs:
        """The entry of one row, with up to `count` alternatives."""
        token, own, rank, *rest = line
        size = len(rest) // 2
        top = [self._entry(rest[place], rest[size + place], place + 1) for place in range(min(count, size))]
        return TokenLogprobs(self._entry(token, own, int(rank)), top)

    def of_prompt(self, logits: torch.Tensor, tokens: list[int], begin: int, count: int) -> list[TokenLogprobs | None]:
        """Entries of the prompt tokens that a part of it predicts; the very first token has none.

        Args:
            logits: (columns, vocabulary) of tokens[begin:begin + columns].
        """
        entries: list[TokenLogprobs | None] = [None] if begin == 0 else []
        following = tokens[begin + 1 : begin + 1 + logits.shape[0]]
        if following:
            wanted = torch.tensor(following, dtype=torch.long, device=logits.device)
            lines = table(logits[: len(following)], wanted, count).tolist()
            entries += [self.make(line, count) for line in lines]
        return entries

    def _entry(self, token: float, value: float, rank: int) -> Logprob:
        number = int(token)
        text = self._texts.get(number)
        if text is None:
            text = self._texts[number] = str(self._tokenizer.decode([number]))
        return Logprob(number, value, text, rank)
