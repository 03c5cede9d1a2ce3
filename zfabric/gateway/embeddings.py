"""OpenAI's /v1/embeddings (https://platform.openai.com/docs/api-reference/embeddings)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.inputs import Inputs, inputs_of
from zfabric.gateway.sse import encode
from zfabric.gateway.together import with_count


class EmbeddingsRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body. Below OpenAI's own fields are the fabric's: `zfabric.EmbedOptions` says what they do."""

    model: str
    input: Inputs
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    normalize: bool | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    priority: int | None = None
    prompt_name: str | None = None
    timeout: float | None = None
    truncate: Literal["error", "cut", "chunk"] | None = None


_DECODER: Final = decoder(EmbeddingsRequest)
_OPTIONS: Final = ("dimensions", "normalize", "pooling", "priority", "prompt_name", "timeout", "truncate")


async def embeddings(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    inputs = inputs_of("input", request.input)
    call.check_model(request.model)
    body = await call.unless_left(_embed(call, request, inputs))
    await call.response.whole(200, body)


ENDPOINTS: Final = (Endpoint("POST", "/v1/embeddings", embeddings),)


async def _embed(call: Call, request: EmbeddingsRequest, inputs: Sequence[str | list[int]]) -> bytes:
    options: Any = {name: value for name in _OPTIONS if (value := getattr(request, name)) is not None}
    given: Any = inputs
    client, model = call.client, request.model
    vectors, tokens = await with_count(client.embed(model, given, **options), client, model, inputs)
    rows: list[Any] = vectors.tolist() if request.encoding_format == "float" else [_base64(row) for row in vectors]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return encode({"object": "list", "data": data, "model": request.model, "usage": usage})


def _base64(row: Any) -> str:
    """Float32 values, little-endian, as OpenAI's SDK reads them."""
    return base64.b64encode(row.tobytes()).decode("ascii")
