"""The sampler: from the logits of a step to one token for each row, each by its own parameters, and its log-probabilities.

Order, as in transformers: penalties and biases on the logits, then temperature, top-k, top-p, min-p, typical-p. A draw is
the inverse of the distribution function at a number that depends on the request's seed and the token's position alone:
the same seed draws the same text, whoever shares the batch, and a continuation needs no generator's state.

All of it is computed where the logits are. Of a step whose rows are those of the last one the host sends nothing there, but what
guides allow, and waits for nothing but the copy of what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import torch

from zfabric.backends.hf_transformers.request.row import Row
from zfabric.backends.hf_transformers.request.sequence import Sequence
from zfabric.backends.hf_transformers.sampling.argmax import argmax
from zfabric.backends.hf_transformers.sampling.logits_processors import NOTHING, OFF
from zfabric.backends.hf_transformers.sampling.logprobs import Entries, table
from zfabric.backends.hf_transformers.sampling.pending_draws import Drawn, PendingDraws
from zfabric.backends.hf_transformers.sampling.sampling_metadata import SamplingMetadata
from zfabric.backends.hf_transformers.sampling.token_histories import TokenHistories
from zfabric.backends.hf_transformers.sampling.warping import inverse, pick


class Sampler:
    """Draws tokens, with what is told of them in one copy to the host.

    Args:
        tokenizer: For the texts of log-probabilities.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.entries = Entries(tokenizer)
        self._draws = Draws()

    def sample(self, rows: list[Sequence], logits: torch.Tensor, ahead: Many[int] | None = None) -> list[Drawn]:
        """A token for each row, with its entry if one is wanted; see `sample_async`."""
        return self.sample_async(rows, logits, ahead).result()

    def sample_async(self, rows: list[Sequence], logits: torch.Tensor, ahead: Many[int] | None = None) -> PendingDraws:
        """Draw a token for each row, and begin to bring it to the host.

        Args:
            rows: May have a row several times, at different places, if it is `independent`.
            logits: (rows, vocabulary); changed in place.
            ahead: How many tokens beyond the end of its answer each row draws; 0 for all if None. Of a row that is not
                independent these have to be what was drawn last.
        """
        metadata = self._draws.metadata([one.row for one in rows], logits, ahead)
        if not metadata.told_places:
            tokens = draw(logits, metadata)
            return PendingDraws(_readable(tokens, metadata), tokens, _unpacked)
        untouched = logits if metadata.told is None else logits.index_select(0, metadata.told)
        if metadata.told is None and metadata.processors is not None:
            untouched = logits.clone()
        tokens = draw(logits, metadata)
        readable = _readable(tokens, metadata)
        told = readable if metadata.told is None else readable.index_select(0, metadata.told)
        lines = table(untouched, told, max(count or 0 for count in metadata.alternatives))
        packed = torch.cat([tokens.to(lines.dtype), lines.flatten()])
        return PendingDraws(readable, packed, self._unpacker(metadata, lines.shape[1]))

    def _unpacker(self, metadata: SamplingMetadata, width: int) -> Callable[[list[Any]], list[Drawn]]:
        """Makes draws of numbers: the rows' tokens, and so many for each row that is told of."""
        places, alternatives = metadata.told_places, metadata.alternatives

        def unpack(numbers: list[Any]) -> list[Drawn]:
            drawn: list[Drawn] = [(int(token), None) for token in numbers[: len(alternatives)]]
            begin = len(drawn)
            for index in places:
                entry = self.entries.make(numbers[begin : begin + width], alternatives[index] or 0)
                drawn[index] = (drawn[index][0], entry)
                begin += width
            return drawn

        return unpack


def _unpacked(numbers: list[int]) -> list[Drawn]:
    return [(token, None) for token in numbers]


def _readable(tokens: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """What a model can be given: some token in place of NOTHING."""
    return tokens if metadata.processors is None else tokens.clamp(min=0)


class Draws:
    """Keeps from step to step what does not change: parameters of rows, their histories, and numbers for some draws."""

    def __init__(self) -> None:
        self._metadata: SamplingMetadata | None = None
        self._histories: TokenHistories | None = None

    def metadata(self, rows: list[Row], logits: torch.Tensor, ahead: Many[int] | None = None) -> SamplingMetadata:
        """What these rows are drawn by.

        Args:
            logits: (rows, vocabulary); of one device and vocabulary at each call.
            ahead: As of `Sampler.sample_async`.
        """
        positions = [len(row.output) for row in rows]
        if ahead is not None:
            positions = [position + further for position, further in zip(positions, ahead, strict=True)]
        # What fails on its way, for want of memory say, is made anew.
        metadata, self._metadata = self._metadata, None
        if metadata is not None and metadata.of(rows):
            metadata.move(positions)
        else:
            if self._histories is None:
                self._histories = TokenHistories(logits.shape[1], logits.device)
            metadata = SamplingMetadata([*rows], positions, self._histories, metadata)
        self._metadata = metadata
        return metadata


def sample(logits: torch.Tensor, rows: Many[Row], ahead: Many[int] | None = None) -> torch.Tensor:
    """Draw once, and keep nothing of the rows; see `draw`."""
    return draw(logits, Draws().metadata([*rows], logits, ahead))


def draw(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """One token per row.

    Args:
        logits: Float32 (rows, vocabulary); changed in place where rows have penalties.
        metadata: Of the rows. Their histories go on with what is drawn.

    Returns:
        int64 tensor (rows,), on the device of the logits. NOTHING where all tokens of a row are banned.
    """
    processors = metadata.processors
    if processors is None:
        return _sampled(logits, metadata)
    processors.apply(logits)
    tokens = _sampled(logits, metadata)
    off = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) == OFF
    tokens = tokens.masked_fill(off, NOTHING)
    processors.follow(tokens)
    return tokens


def _sampled(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """What is drawn of logits that are final."""
    if metadata.greedy:
        return argmax(logits)
    if metadata.drawn is None:
        return _drawn(logits, metadata)
    tokens = argmax(logits)
    return tokens.index_copy_(0, metadata.drawn, _drawn(logits.index_select(0, metadata.drawn), metadata))


def _drawn(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Draw for rows that are not greedy."""
    scores = logits if metadata.temperature is None else logits / metadata.temperature
    numbers = metadata.numbers
    if metadata.warpers is None:
        return inverse(scores, numbers)
    if metadata.warped is None or metadata.unwarped is None:
        return pick(scores, metadata.warpers, numbers)
    tokens = torch.empty(scores.shape[0], dtype=torch.long, device=scores.device)
    for some, warped in ((metadata.warped, True), (metadata.unwarped, False)):
        its, its_numbers = scores.index_select(0, some), numbers.index_select(0, some)
        drawn = pick(its, metadata.warpers, its_numbers) if warped else inverse(its, its_numbers)
        tokens.index_copy_(0, some, drawn)
    return tokens
