"""The forward pass over pages: the tokens of all rows in one line, prompts and steps together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zfabric.backends.hf_transformers.lora import Adapter
from zfabric.backends.hf_transformers.model_runner import ModelRunner
from zfabric.backends.hf_transformers.paged_attention import PagedPass
from zfabric.backends.hf_transformers.paged_cache import PagedCache
from zfabric.backends.hf_transformers.sequence import Answer
from zfabric.wire.payloads import GenerateRequest

_NOBODY = Answer(GenerateRequest())


@dataclass(frozen=True, slots=True)
class Part:
    """What a pass computes of one row.

    Attributes:
        tokens: Those that are computed.
        length: Tokens of the row afterwards.
        blocks: Where they lie.
        logits: After which of the tokens they are wanted.
    """

    answer: Answer
    tokens: Sequence[int]
    length: int
    blocks: Sequence[int]
    logits: Literal["none", "last", "all"]


class PagedRunner:
    """A decoder over a pool of blocks.

    Args:
        model: Its forward pass.
        blocks: Of the pool.
        tokens: That each has room for.
    """

    def __init__(self, model: ModelRunner, blocks: int, tokens: int) -> None:
        self.model = model
        self.blocks, self.tokens = blocks, tokens
        self.cache = PagedCache(blocks, tokens)

    def forward(self, parts: Sequence[Part]) -> torch.Tensor:
        """Compute, and write keys and values to the pool.

        Args:
            parts: Those of one token first.

        Returns:
            Float32 logits, (wanted, vocabulary), in the order of the parts and their tokens.
        """
        counts = [len(part.tokens) for part in parts]
        passed = PagedPass(counts, [part.length for part in parts], [part.blocks for part in parts], self.tokens)
        tokens = [token for part in parts for token in part.tokens]
        places = [place for part in parts for place in range(part.length - len(part.tokens), part.length)]
        adapters: list[Adapter | None] = []
        if any(part.answer.adapter is not None for part in parts):
            adapters = [part.answer.adapter for part, count in zip(parts, counts, strict=True) for _ in range(count)]
        return self.model.packed(tokens, places, adapters, _wanted(parts), self.cache, passed)

    def probe(self) -> None:
        """A prompt and a step, in the block that is nobody's: what the model makes of any, if it is whole."""
        with torch.inference_mode():
            for count, length in ((8, 8), (1, 9)):
                self.forward([Part(_NOBODY, [0] * count, length, [self.cache.scratch], "last")])


def _wanted(parts: Sequence[Part]) -> list[int]:
    """Which tokens' logits are."""
    wanted: list[int] = []
    end = 0
    for part in parts:
        begin, end = end, end + len(part.tokens)
        if part.logits != "none":
            wanted += range(begin if part.logits == "all" else end - 1, end)
    return wanted
