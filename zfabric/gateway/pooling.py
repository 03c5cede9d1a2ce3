"""vLLM's /pooling (https://docs.vllm.ai/en/latest/models/pooling_models.html): what a pooling model makes of its inputs."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from zfabric.errors import RequestError, UnsupportedParameterError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.inputs import Inputs, inputs_of
from zfabric.gateway.sse import encode
from zfabric.gateway.together import with_count

Task = Literal["embed", "token_embed", "classify", "token_classify"]


class PoolingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body: inputs, or the messages of one chat. "token_classify" asks for rewards, which chats can have alone."""

    model: str
    task: Task
    input: Inputs | None = None
    messages: list[dict[str, Any]] | None = None
    dimensions: int | None = None
    encoding_format: Literal["float"] = "float"
    priority: int | None = None
    prompt_name: str | None = None
    timeout: float | None = None
    truncate: Literal["error", "cut"] | None = None
    use_activation: bool | None = None
    user: str | None = None


_DECODER: Final = decoder(PoolingRequest)
_SHARED: Final = ("priority", "timeout")
_VECTORS: Final = ("dimensions", "prompt_name", "truncate")


async def pooling(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    call.check_model(request.model)
    if (request.input is None) == (request.messages is None):
        raise RequestError("give input or messages, and not both", parameter="input")
    if request.messages is not None and request.task != "token_classify":
        raise UnsupportedParameterError(
            f"messages go with task token_classify, not {request.task}", parameter="messages"
        )
    inputs = [request.messages] if request.messages is not None else inputs_of("input", request.input or [])
    await call.response.whole(200, await call.unless_left(_pool(call, request, inputs)))


ENDPOINTS: Final = (Endpoint("POST", "/pooling", pooling),)


async def _pool(call: Call, request: PoolingRequest, inputs: list[Any]) -> bytes:
    counted = [] if request.messages is not None else inputs
    found, tokens = await with_count(_made(call, request, inputs), call.client, request.model, counted)
    data = [{"index": index, "object": "pooling", "data": made} for index, made in enumerate(found)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    said = {"id": f"pool-{call.id}", "object": "list", "created": created(), "model": request.model}
    return encode({**said, "data": data, "usage": usage})


async def _made(call: Call, request: PoolingRequest, inputs: list[Any]) -> list[Any]:
    """What the model makes of each input."""
    client, model, task = call.client, request.model, request.task
    shared: Any = _given(request, _SHARED)
    vectors: Any = _given(request, _VECTORS)
    if task in ("embed", "token_embed"):
        if request.use_activation is not None:
            vectors["normalize"] = request.use_activation
        if task == "embed":
            return (await client.embed(model, inputs, **shared, **vectors)).tolist()  # type: ignore[no-any-return]
        return [rows.tolist() for rows in await client.embed_tokens(model, inputs, **shared, **vectors)]
    for name in vectors:
        raise UnsupportedParameterError(f"{name!r} does not go with task {task}", parameter=name)
    # Classes are probabilities here, and rewards what the model computes.
    usual = task == "classify"
    if request.use_activation not in (None, usual):
        raise UnsupportedParameterError(
            f"'use_activation' is always {usual} with task {task}", parameter="use_activation"
        )
    if task == "classify":
        return [list(row) for row in await client.classify(model, inputs, **shared)]
    # As vLLM has it: a row of values for each token; a reward of the whole is a row of its own.
    return [[[value] for value in row] for row in await client.reward(model, inputs, **shared)]


def _given(request: PoolingRequest, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(request, name)) is not None}
