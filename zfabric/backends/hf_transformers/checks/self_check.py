"""Whether a model can be batched at all: its rows must say what it says of each text alone.

Hundreds of architectures share one interface, and some of them break what a batch with padding and a cache relies on:
they look at tokens that come later, count positions from the first column, or keep what is not in the cache. No list of
names would be complete, so the model itself is asked, once, before it serves: two texts of different lengths, in two parts
and side by side, against the model's own answer to each of them alone and whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.failures import named
from zfabric.backends.hf_transformers.pooling.classifying import Classifier
from zfabric.backends.hf_transformers.pooling.embedding import Embedder
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.tasks import ClassifyRequest

#: Lengths of the two texts, and where the parts end: the shorter text has its first token in the first part, and the last
#: part is a single column, as in a step.
_LENGTHS: Final = (7, 12)
_PARTS: Final = ((0, 6), (6, 11), (11, 12))
#: How far answers may be from the right ones, by the size of their spread. Rounding gives a few millionths in float32 and
#: some hundredths in half precision, more where it moves a token to another expert; a model that breaks gives one or more.
_TOLERANCE_EXACT: Final = 0.01
_TOLERANCE_HALF: Final = 0.3
_TEXT: Final = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening."


def check_rows(model: ModelRunner, raw: Any, tokenizer: Any, name: str) -> None:
    """Ask a decoder.

    Args:
        model: As the engine runs it.
        raw: The same model of transformers.
        tokenizer: Makes the texts' tokens.
        name: For messages.

    Raises:
        ConfigurationError: Rows of a batch differ from the texts alone, or the model cannot run one.
    """
    texts = two_texts(tokenizer)
    with named(name), torch.inference_mode():
        expected = [alone(raw, text) for text in texts]
        found = _together(model, texts)
    compare([*expected, expected[0]], found, raw, name)


def check_padding(raw: Any, tokenizer: Any, name: str) -> None:
    """Ask an encoder; arguments and errors as of `check_rows`."""
    texts = two_texts(tokenizer)
    width = max(_LENGTHS)
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=raw.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=raw.device)
    with named(name), torch.inference_mode():
        expected = [raw(input_ids=torch.tensor([text], device=raw.device)).last_hidden_state[0] for text in texts]
        found = raw(input_ids=ids, attention_mask=mask).last_hidden_state
        if found.shape[-1] != raw.config.hidden_size:
            raise ConfigurationError(
                f"{name!r} gives {found.shape[-1]} values for a token, its configuration says {raw.config.hidden_size}"
            )
    compare(expected, [row[: len(text)] for row, text in zip(found, texts, strict=True)], raw, name)


def check_verdicts(raw: Any, embedder: Embedder, classifier: Classifier, name: str) -> None:
    """Ask a model with a head of two texts, side by side as the queue computes them and each alone by itself; errors as of
    `check_rows`."""
    request = ClassifyRequest(inputs=[_TEXT, _TEXT[: len(_TEXT) // 2]])
    with named(name), torch.inference_mode():
        pieces = classifier.classified(request).pieces
        expected = []
        for piece in pieces:
            types = {} if piece.types is None else {"token_type_ids": torch.tensor([piece.types], device=raw.device)}
            expected.append(
                raw(input_ids=torch.tensor([piece.tokens], device=raw.device), **types).logits[0].float().cpu()
            )
        rows = embedder.begin(pieces, embedder.modes).advance(sum(len(piece.tokens) for piece in pieces) * len(pieces))
        found = torch.stack(rows or [])
    wanted = torch.stack(expected)
    if wanted.shape != found.shape:
        raise ConfigurationError(f"{name!r} gives logits of shape {tuple(wanted.shape)} for 2 texts", model=name)
    check_distance(float((wanted - found).norm() / wanted.norm().clamp(min=1e-9)), raw, name)


def compare(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], raw: Any, name: str) -> None:
    """Raises: ConfigurationError: One of the answers is not the right one."""
    for right, got in zip(expected, found, strict=True):
        check_distance(difference(right, got), raw, name)


def difference(right: torch.Tensor, got: torch.Tensor) -> float:
    """How far an answer is from the right one, by the size of that one's spread."""
    wanted, given = right.float().cpu(), got.float().cpu()
    return float((wanted - given).norm() / (wanted - wanted.mean()).norm().clamp(min=1e-9))


def tolerance(raw: Any) -> float:
    """How far answers of a model may be from the right ones."""
    exact = next(raw.parameters()).dtype == torch.float32 and getattr(raw, "hf_quantizer", None) is None
    return _TOLERANCE_EXACT if exact else _TOLERANCE_HALF


def check_distance(distance: float, raw: Any, name: str) -> None:
    """Raises: ConfigurationError: Answers are further from the right ones than rounding takes them."""
    if not distance <= tolerance(raw):
        raise ConfigurationError(
            f"{name!r} answers otherwise in a batch than alone (by {distance:.2g} times the spread of its answers), so "
            f"this backend does not serve it",
            model=name,
            architecture=type(raw).__name__,
        )


def two_texts(tokenizer: Any) -> list[list[int]]:
    """Two texts' tokens, without special ones, of the lengths that are wanted."""
    tokens = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"]) or [0]
    while len(tokens) < sum(_LENGTHS):
        tokens += tokens
    return [tokens[: _LENGTHS[0]], tokens[_LENGTHS[0] : sum(_LENGTHS)]]


def alone(raw: Any, text: Sequence[int]) -> torch.Tensor:
    """The model's own logits after a text."""
    ids = torch.tensor([text], dtype=torch.long, device=raw.device)
    last: torch.Tensor = raw(input_ids=ids).logits[0, -1]
    return last


def _together(model: ModelRunner, texts: list[list[int]]) -> list[torch.Tensor]:
    """Logits after both, padded on the left and in parts, by the engine's own pass; then after the shorter one again,
    once the longer one has left and has taken its columns along."""
    width = max(_LENGTHS)
    rows = [[0] * (width - len(text)) + text for text in texts]
    nobody = [Answer(GenerateRequest()) for _ in texts]
    cache = model.start(nobody)
    for begin, end in _PARTS:
        lengths = [len(text) - (width - end) for text in texts]
        both = model([row[begin:end] for row in rows], lengths, cache, answers=nobody)
    cache.crop_to(width - 1)
    cache.select([0], width - _LENGTHS[0])
    alone = model([texts[0][-1:]], [_LENGTHS[0]], cache, answers=nobody[:1])
    return [*both, *alone]
