"""From the logits of a step to its tokens and their entries, with one copy to the host."""

from __future__ import annotations

from typing import Any

import torch

from zfabric.backends.hf_transformers.logprobs import Entries, table
from zfabric.backends.hf_transformers.sampling import draw
from zfabric.backends.hf_transformers.sequence import Sequence
from zfabric.wire.payloads import TokenLogprobs

Drawn = tuple[int, TokenLogprobs | None]


class Drawer:
    """Draws.

    Args:
        tokenizer: For the texts of log-probabilities.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.entries = Entries(tokenizer)

    def draw(self, rows: list[Sequence], logits: torch.Tensor) -> list[Drawn]:
        """A token for each row, with its entry if one is wanted.

        Args:
            logits: (rows, vocabulary); changed in place.
        """
        counts = [row.alternatives for row in rows]
        wanted = [index for index, count in enumerate(counts) if count is not None]
        if not wanted:
            return [(token, None) for token in draw(logits, [row.row for row in rows]).tolist()]
        untouched = logits[wanted]
        tokens = draw(logits, [row.row for row in rows])
        lines = table(untouched, tokens[wanted].clamp(min=0), max(count or 0 for count in counts))
        packed = torch.cat([tokens.to(lines.dtype), lines.flatten()]).tolist()
        drawn: list[Drawn] = [(int(token), None) for token in packed[: len(rows)]]
        for place, index in enumerate(wanted):
            begin = len(rows) + place * lines.shape[1]
            entry = self.entries.make(packed[begin : begin + lines.shape[1]], counts[index] or 0)
            drawn[index] = (drawn[index][0], entry)
        return drawn
