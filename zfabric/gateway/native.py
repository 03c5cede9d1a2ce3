"""/generate: the fabric's own form, with token ids in and out, for programs that train or measure models over HTTP."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.client.results import Completion
from zfabric.errors import FabricError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.sampling import TextFields, text_options
from zfabric.wire.payloads import Delta, Logprob


class GenerateRequest(TextFields, forbid_unknown_fields=True, kw_only=True):
    """The body: fields of the other APIs, and one kind of prompt. Without `max_tokens` the model's default holds, else 256."""

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    echo: bool | None = None
    logprobs: int | None = None


_DECODER: Final = decoder(GenerateRequest)
_PASSED: Final = ("prompt_token_ids", "messages", "echo", "logprobs", "max_tokens")


async def generate(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    call.check_model(request.model)
    options = text_options(request)
    options |= {name: value for name in _PASSED if (value := getattr(request, name)) is not None}
    ask = Ask(request.model, request.prompt, options)
    await answer(call, [ask], GenerateWording(), stream=bool(request.stream))


ENDPOINTS: Final = (Endpoint("POST", "/generate", generate),)


class GenerateWording:
    """Answers as `Completion.to_dict` has them; a stream is a delta an event, and at last the answer without its choices."""

    def delta(self, position: int, delta: Delta) -> bytes:
        said: dict[str, Any] = {
            "index": delta.index, "text": delta.text, "token_ids": delta.token_ids, "finish_reason": delta.finish_reason,
        }  # fmt: skip
        if delta.reasoning:
            said["reasoning"] = delta.reasoning
        if delta.extra:
            said["extra"] = delta.extra
        if delta.logprobs is not None:
            said["logprobs"] = [
                {**_entry(one.token), "top": [_entry(other) for other in one.top]} for one in delta.logprobs
            ]
        return sse.event(said)

    def ending(self, completions: list[Completion]) -> bytes:
        [completion] = completions
        said = completion.to_dict()
        del said["choices"]
        return sse.event(said) + sse.DONE

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        [completion] = completions
        return sse.encode(completion.to_dict())


def _entry(logprob: Logprob) -> dict[str, Any]:
    return msgspec.structs.asdict(logprob)
