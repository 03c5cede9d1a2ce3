"""Whether an encoder-decoder can be batched: as of decoders (`self_check`), the model itself is asked.

Two texts of different lengths are read, and two answers to them, of other lengths, are gone through in parts and side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.kv_cache import EncoderDecoderKVCache
from zfabric.backends.hf_transformers.checks.self_check import compare, difference, tolerance, two_texts
from zfabric.backends.hf_transformers.failures import named
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.encoder_decoder import EncoderDecoderRunner
from zfabric.backends.hf_transformers.runner.speech import FEATURES, SpeechRunner
from zfabric.wire.payloads import GenerateRequest

#: Where parts of the longer answer end; the shorter one has its first token in the first part.
_PARTS: Final = ((0, 6), (6, 11), (11, 12))
#: Beside so many rows another one joins, which has so many tokens: some experts look for padding where other rows stand.
_MATES: Final = 3
_LATE: Final = 2


def check_pairs(model: EncoderDecoderRunner, raw: Any, tokenizer: Any, name: str) -> None:
    """Ask it. An encoder that reads texts otherwise together than alone is had read them one by one from then on.

    Arguments and errors as of `self_check.check_rows`.
    """
    texts = two_texts(tokenizer)
    answers = [_asked(model, text) for text in texts]
    # It may write by fewer tokens than it reads.
    written = [[token % model.vocabulary_size for token in text[::-1]] for text in texts]
    with named(name), torch.inference_mode():
        expected = [_alone(raw, *pair) for pair in zip(answers, written, strict=True)]
        late = _alone(raw, answers[0], written[0][:_LATE])
        expected = [*expected, expected[0], *[expected[1]] * _MATES, late]
        if not model.apart:
            found = _together(model, answers, written)
            model.apart = any(
                not difference(right, got) <= tolerance(raw) for right, got in zip(expected, found, strict=True)
            )
        if model.apart:
            found = _together(model, answers, written)
    compare(expected, found, raw, name)


def _asked(model: EncoderDecoderRunner, text: list[int]) -> Answer:
    """A request with a text; a model that hears is given a noise that depends on it."""
    answer = Answer(GenerateRequest())
    if isinstance(model, SpeechRunner):
        noise = torch.Generator().manual_seed(len(text))
        answer.media = {FEATURES: torch.randn(model.silence().shape, generator=noise)}
    else:
        answer.source = text
    return answer


def _alone(raw: Any, asked: Answer, written: Sequence[int]) -> torch.Tensor:
    """The model's own logits after a request's answer so far."""
    answer = torch.tensor([written], dtype=torch.long, device=raw.device)
    if asked.media is not None:
        read = {FEATURES: asked.media[FEATURES].to(device=raw.device, dtype=raw.dtype)}
    else:
        read = {"input_ids": torch.tensor([asked.source], dtype=torch.long, device=raw.device)}
    # With a cache, some make no mask of what comes later.
    last: torch.Tensor = raw(**read, decoder_input_ids=answer, use_cache=False).logits[0, -1]
    return last


def _together(model: EncoderDecoderRunner, answers: list[Answer], texts: list[list[int]]) -> list[torch.Tensor]:
    """Logits after both, by the engine's own pass; after the shorter one again, once the longer one has left; and after some of
    the longer one and the begin of the shorter one, which has joined them, so that its padding holds nothing."""
    width = max(len(text) for text in texts)
    rows = [[0] * (width - len(text)) + text for text in texts]
    cache = model.start(answers)
    for begin, end in _PARTS:
        lengths = [len(text) - (width - end) for text in texts]
        both = model([row[begin:end] for row in rows], lengths, cache, answers=answers)
    cache.crop_to(width - 1)
    cache.select([0], width - len(texts[0]))
    alone = model([texts[0][-1:]], [len(texts[0])], cache, answers=answers[:1])
    rows = [texts[1]] * _MATES + [texts[0][:_LATE]]
    owners = [answers[1]] * _MATES + [answers[0]]
    joined = _begun(model, owners[0], rows[0])
    for row, answer in zip(rows[1:], owners[1:], strict=True):
        joined.merge(_begun(model, answer, row))
    step = model([row[-1:] for row in rows], [len(row) for row in rows], joined, answers=owners)
    return [*both, *alone, *step]


def _begun(model: EncoderDecoderRunner, answer: Answer, text: list[int]) -> EncoderDecoderKVCache:
    """The cache of all but the last token of a text."""
    cache = model.start([answer])
    model([text[:-1]], [len(text) - 1], cache, answers=[answer])
    return cache
