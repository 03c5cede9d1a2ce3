"""Embeddings: batches in parallel up to a limit, in the order of the inputs."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy

from zfabric.backends.hf_api.channel import Channel
from zfabric.errors import BackendError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.payloads import EmbedRequest, EmbedResult


async def embed(channel: Channel, request: EmbedRequest) -> EmbedResult:
    """One vector per input. If one batch fails, the others are cancelled.

    Raises:
        UnsupportedParameterError: A pooling of the caller's own, or truncate="chunk".
        UnsupportedOperationError: Inputs are tokens.
        FabricError: What the upstream answered.
    """
    upstream = channel.upstream
    texts = _checked(channel, request)
    # With "error" the server says no by itself; it is not asked to cut.
    options: dict[str, Any] = {"truncate": request.truncate == "cut", "normalize": False}
    batches = [texts[start : start + upstream.batch_size] for start in range(0, len(texts), upstream.batch_size)]
    places = asyncio.Semaphore(upstream.parallel)

    async def one(batch: list[str]) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
        async with places:
            return _rows(await channel.call("", {"inputs": batch, **options}), len(batch), channel.name)

    tasks = [asyncio.create_task(one(batch)) for batch in batches]
    try:
        parts = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if len({part.shape[1] for part in parts}) != 1:
        raise BackendError(f"upstream of {channel.name!r} answered with vectors of different lengths")
    vectors = numpy.concatenate(parts)
    if request.dimensions is not None:
        if request.dimensions > vectors.shape[1]:
            raise UnsupportedParameterError(
                f"dimensions is {request.dimensions}, model {channel.name!r} has {vectors.shape[1]}",
                parameter="dimensions",
            )
        vectors = vectors[:, : request.dimensions]
    if request.normalize:
        lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / numpy.where(lengths == 0, 1, lengths)
    data = numpy.ascontiguousarray(vectors, dtype="<f4")
    return EmbedResult(rows=data.shape[0], dimensions=data.shape[1], data=data.tobytes())


def _checked(channel: Channel, request: EmbedRequest) -> list[str]:
    refused = {"pooling": request.pooling is not None, "truncate": request.truncate == "chunk"}
    for name, is_set in refused.items():
        if is_set:
            raise UnsupportedParameterError(
                f"{name}={getattr(request, name)!r} is not supported by model {channel.name!r}", parameter=name
            )
    texts = [text for text in request.inputs if isinstance(text, str)]
    if len(texts) != len(request.inputs):
        raise UnsupportedOperationError(f"model {channel.name!r} embeds texts, not tokens", operation="embed")
    return texts


def _rows(answer: bytes, count: int, model: str) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    """A matrix of one row per input."""
    try:
        rows = numpy.array(msgspec.json.decode(answer), dtype=numpy.float32)
    except (ValueError, TypeError) as error:
        raise BackendError(f"upstream of {model!r} answered with something that is no list of vectors") from error
    if rows.ndim != 2 or rows.shape[0] != count or not rows.shape[1]:
        shape = "×".join(str(side) for side in rows.shape)
        raise BackendError(f"upstream of {model!r} answered with an array of {shape}, not of one vector per input")
    return rows
