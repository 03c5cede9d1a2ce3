"""Embeddings: batches in parallel up to a limit, in the order of the inputs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy

from zfabric.backends.hf_api.batches import in_batches
from zfabric.backends.hf_api.channel import Channel
from zfabric.backends.hf_api.models_file import Upstream
from zfabric.backends.hf_api.requests import path_of
from zfabric.errors import BackendError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.tasks import EmbedRequest, EmbedResult

Rows = numpy.ndarray[Any, numpy.dtype[numpy.float32]]
Row = Rows


async def embed(channel: Channel, request: EmbedRequest) -> EmbedResult:
    """One vector per input. If one batch fails, the others are cancelled.

    Raises:
        UnsupportedParameterError: A pooling of the caller's own, truncate="chunk", or "cut" where the server cannot.
        UnsupportedOperationError: Inputs are tokens, which this protocol does not take, or texts and tokens mixed.
        FabricError: What the upstream answered.
    """
    upstream = channel.upstream
    _check(upstream, request)

    async def one(batch: Sequence[str | list[int]]) -> list[Row]:
        answer = await channel.call(path_of(upstream), _body(upstream, request, batch))
        return list(_rows(answer, len(batch), upstream))

    rows = await in_batches(channel, request.inputs, one)
    if len({len(row) for row in rows}) != 1:
        raise BackendError(f"upstream of {channel.name!r} answered with vectors of different lengths")
    vectors = numpy.stack(rows)
    if request.dimensions is not None:
        if request.dimensions > vectors.shape[1]:
            raise UnsupportedParameterError(
                f"dimensions is {request.dimensions}, model {channel.name!r} has {vectors.shape[1]}",
                parameter="dimensions",
            )
        vectors = vectors[:, : request.dimensions]
    if request.normalize:
        lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
        vectors = vectors / lengths
    data = numpy.ascontiguousarray(vectors, dtype="<f4")
    return EmbedResult(rows=data.shape[0], dimensions=data.shape[1], data=data.tobytes())


def _check(upstream: Upstream, request: EmbedRequest) -> None:
    openai = upstream.protocol == "embeddings"
    refused = {
        "pooling": request.pooling is not None,
        # Others know no prompts by their names.
        "prompt_name": request.prompt_name is not None and upstream.server != "tei",
        # The field for it is vLLM's own; others cut or refuse as they like.
        "truncate": request.truncate == "chunk" or (request.truncate == "cut" and openai and upstream.server != "vllm"),
    }
    for name, is_set in refused.items():
        if is_set:
            raise UnsupportedParameterError(
                f"{name}={getattr(request, name)!r} is not supported by model {upstream.name!r}", parameter=name
            )
    kinds = {type(given) for given in request.inputs}
    if kinds != {str} and not (openai and len(kinds) == 1):
        takes = "texts or tokens, not both at once" if openai else "texts, not tokens"
        raise UnsupportedOperationError(f"model {upstream.name!r} embeds {takes}", operation="embed")


def _body(upstream: Upstream, request: EmbedRequest, batch: Sequence[str | list[int]]) -> dict[str, Any]:
    """One batch's request. What is too long is refused by the server itself, unless it is asked to cut."""
    cut = request.truncate == "cut"
    if upstream.protocol != "embeddings":
        named = {} if request.prompt_name is None else {"prompt_name": request.prompt_name}
        return {"inputs": batch, "truncate": cut, "normalize": False, **named}
    body = {"model": upstream.model, "input": batch, "encoding_format": "base64"}
    return {**body, "truncate_prompt_tokens": -1} if cut else body


def _rows(answer: bytes, count: int, upstream: Upstream) -> Rows:
    """A matrix of one row per input."""
    try:
        found = msgspec.json.decode(answer)
        if upstream.protocol == "embeddings":
            lines = sorted(found["data"], key=lambda line: line["index"])
            found = [_vector(line["embedding"]) for line in lines]
        rows = numpy.array(found, dtype=numpy.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise BackendError(
            f"upstream of {upstream.name!r} answered with something that is no list of vectors"
        ) from error
    if rows.ndim != 2 or rows.shape[0] != count or not rows.shape[1]:
        shape = "×".join(str(side) for side in rows.shape)
        raise BackendError(
            f"upstream of {upstream.name!r} answered with an array of {shape}, not of one vector per input"
        )
    return rows


def _vector(value: Any) -> Any:
    """Base64 of float32 values is asked for; a server that does not know it gives a list."""
    return numpy.frombuffer(base64.b64decode(value), dtype="<f4") if isinstance(value, str) else value
