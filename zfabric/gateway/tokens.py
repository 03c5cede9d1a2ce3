"""vLLM's /tokenize and /detokenize (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.errors import UnsupportedParameterError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.sse import encode


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body: a prompt or messages. What is special is added as for an answer, which is what the flags say by default."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    model: str
    tokens: list[int]


_TOKENIZE: Final = decoder(TokenizeRequest)
_DETOKENIZE: Final = decoder(DetokenizeRequest)


async def tokenize(call: Call) -> None:
    """Answer a call with the tokens that an answer would start from."""
    request = decode(_TOKENIZE, call.body)
    usual = request.messages is None
    for name, given, holds in (
        ("add_generation_prompt", request.add_generation_prompt, True),
        ("add_special_tokens", request.add_special_tokens, usual),
    ):
        if given is not None and given != holds:
            raise UnsupportedParameterError(f"{name!r} is always {holds} here", parameter=name)
    client, model = call.client, call.check_model(request.model)

    async def work() -> bytes:
        tokens = await client.tokenize(model, request.prompt, messages=request.messages)
        strings = [await client.detokenize(model, [token]) for token in tokens] if request.return_token_strs else None
        length = (await client.model_details(model)).context_length
        said = {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": strings}
        return encode(said)

    await call.response.whole(200, await call.unless_left(work()))


async def detokenize(call: Call) -> None:
    """Answer a call with the text of tokens."""
    request = decode(_DETOKENIZE, call.body)
    model = call.check_model(request.model)
    text = await call.unless_left(call.client.detokenize(model, request.tokens))
    await call.response.whole(200, encode({"prompt": text}))


ENDPOINTS: Final = (Endpoint("POST", "/tokenize", tokenize), Endpoint("POST", "/detokenize", detokenize))
