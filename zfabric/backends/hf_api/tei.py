"""Text Embeddings Inference (https://huggingface.github.io/text-embeddings-inference): what it does beside vectors of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy

from zfabric.backends.hf_api.batches import in_batches
from zfabric.backends.hf_api.channel import Channel
from zfabric.errors import BackendError, ParameterRangeError, RequestError, UnsupportedOperationError
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)

#: What a server can be asked, by what the models file says it is for. Each server has one model, of one kind.
CAPABILITIES: Final[dict[str, tuple[str, ...]]] = {
    "embed": ("embed", "embed_tokens", "score"),
    "rerank": ("score",),
    "classify": ("classify", "reward"),
}


async def embed_tokens(channel: Channel, request: EmbedTokensRequest) -> EmbedTokensResult:
    """A vector of each token, from /embed_all.

    Raises:
        RequestError: Inputs are tokens, which the server does not take.
        ParameterRangeError: More dimensions than there are.
        FabricError: What the upstream answered.
    """
    if not all(isinstance(given, str) for given in request.inputs):
        raise RequestError(f"model {channel.name!r} embeds texts, not tokens", parameter="inputs")
    named = {} if request.prompt_name is None else {"prompt_name": request.prompt_name}

    async def one(batch: Sequence[Any]) -> list[Any]:
        body = {"inputs": batch, "truncate": request.truncate == "cut", **named}
        return _list(await channel.call("/embed_all", body), len(batch), channel)

    rows = await in_batches(channel, request.inputs, one)
    try:
        matrix = numpy.concatenate([numpy.array(row, dtype=numpy.float32) for row in rows])
        size = matrix.shape[1]
    except (ValueError, IndexError) as error:
        raise _garbage(channel) from error
    dimensions = size if request.dimensions is None else request.dimensions
    if dimensions > size:
        raise ParameterRangeError(
            f"dimensions is {dimensions}, model {channel.name!r} has {size}",
            parameter="dimensions",
            value=str(dimensions),
        )
    matrix = matrix[:, :dimensions]
    if request.normalize:
        matrix = matrix / numpy.maximum(
            numpy.linalg.norm(matrix, axis=1, keepdims=True), numpy.finfo(numpy.float32).tiny
        )
    return EmbedTokensResult([len(row) for row in rows], dimensions, matrix.astype("<f4").tobytes())


async def score(channel: Channel, request: ScoreRequest) -> list[float]:
    """From /rerank, or from /similarity of a model that makes vectors. Raises: FabricError: What the upstream answered."""

    async def reranked(batch: Sequence[str]) -> list[float]:
        body = {"query": request.query, "texts": batch, "raw_scores": False, "truncate": False}
        lines = _list(await channel.call("/rerank", body), len(batch), channel)
        try:
            found = {int(line["index"]): float(line["score"]) for line in lines}
            return [found[index] for index in range(len(batch))]
        except (KeyError, TypeError, ValueError) as error:
            raise _garbage(channel) from error

    async def compared(batch: Sequence[str]) -> list[float]:
        body = {"inputs": {"source_sentence": request.query, "sentences": batch}}
        return [float(value) for value in _list(await channel.call("/similarity", body), len(batch), channel)]

    return await in_batches(channel, request.documents, reranked if channel.upstream.task == "rerank" else compared)


async def classify(channel: Channel, request: ClassifyRequest) -> ClassifyResult:
    """From /predict. The server gives classes in the order of their probabilities; here they are in that of their names.

    Raises:
        FabricError: What the upstream answered.
    """
    inputs = [[given] if isinstance(given, str) else given for given in request.inputs]
    lines = await _predicted(channel, inputs, raw=False)
    labels = sorted(lines[0])
    return ClassifyResult([[line.get(label, 0.0) for label in labels] for line in lines], labels)


async def reward(channel: Channel, request: RewardRequest) -> list[list[float]]:
    """From /predict, of a model with one class.

    Raises:
        UnsupportedOperationError: Chats, for which the server has no template; or the model has several classes.
        FabricError: What the upstream answered.
    """
    texts = [[given] for given in request.inputs if isinstance(given, str)]
    if len(texts) != len(request.inputs):
        raise UnsupportedOperationError(f"model {channel.name!r} judges texts, not chats", operation="reward")
    lines = await _predicted(channel, texts, raw=True)
    if any(len(line) != 1 for line in lines):
        raise UnsupportedOperationError(
            f"model {channel.name!r} gives {len(lines[0])} classes and no rewards", operation="reward"
        )
    return [list(line.values()) for line in lines]


async def tokenize(channel: Channel, text: str) -> list[int]:
    """From /tokenize. Raises: FabricError: What the upstream answered."""
    body = {"inputs": text, "add_special_tokens": True}
    [tokens] = _list(await channel.call("/tokenize", body), 1, channel)
    try:
        return [int(token["id"]) for token in tokens]
    except (KeyError, TypeError, ValueError) as error:
        raise _garbage(channel) from error


async def detokenize(channel: Channel, request: DetokenizeRequest) -> str:
    """From /decode. Raises: FabricError: What the upstream answered."""
    body = {"ids": request.token_ids, "skip_special_tokens": request.skip_special_tokens}
    [text] = _list(await channel.call("/decode", body), 1, channel)
    return str(text)


async def _predicted(channel: Channel, inputs: Sequence[list[str]], *, raw: bool) -> list[dict[str, float]]:
    """For each input what the model says of each class, by its name."""

    async def one(batch: Sequence[list[str]]) -> list[dict[str, float]]:
        body = {"inputs": batch, "raw_scores": raw, "truncate": False}
        lines = _list(await channel.call("/predict", body), len(batch), channel)
        try:
            return [{str(told["label"]): float(told["score"]) for told in line} for line in lines]
        except (KeyError, TypeError, ValueError) as error:
            raise _garbage(channel) from error

    return await in_batches(channel, inputs, one)


def _list(answer: bytes, count: int, channel: Channel) -> list[Any]:
    """An answer of one entry per input."""
    try:
        found = msgspec.json.decode(answer)
    except ValueError as error:
        raise _garbage(channel) from error
    if not isinstance(found, list) or len(found) != count:
        raise _garbage(channel)
    return found


def _garbage(channel: Channel) -> BackendError:
    return BackendError(f"upstream of {channel.name!r} answered with something that is not of its protocol")
