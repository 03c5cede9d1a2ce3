"""vLLM's /tokenize and /detokenize (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.errors import UnsupportedParameterError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.sse import encode


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body: a prompt or messages. The tokens are those that an answer starts from."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool = False
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    model: str
    tokens: list[int]


#: What a template is told, and what says no more than what holds anyway.
_TEMPLATE: Final = ("add_generation_prompt", "chat_template_kwargs", "continue_final_message", "tools")
_USUAL: Final[dict[str, object]] = {"add_generation_prompt": True, "continue_final_message": False}
_TOKENIZE: Final = decoder(TokenizeRequest)
_DETOKENIZE: Final = decoder(DetokenizeRequest)


async def tokenize(call: Call) -> None:
    """Answer a call with the tokens that an answer would start from."""
    request = decode(_TOKENIZE, call.body)
    # A prompt gets them and a template writes its own, as for an answer.
    usual = request.messages is None
    if request.add_special_tokens not in (None, usual):
        raise UnsupportedParameterError(f"'add_special_tokens' is always {usual} here", parameter="add_special_tokens")
    template: Any = {
        name: value for name in _TEMPLATE if (value := getattr(request, name)) not in (None, _USUAL.get(name))
    }
    client, model = call.client, call.check_model(request.model)

    async def work() -> bytes:
        tokens = await client.tokenize(model, request.prompt, messages=request.messages, **template)
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
