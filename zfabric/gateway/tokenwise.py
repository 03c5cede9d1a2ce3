"""/inference/v1/generate: tokens in and out, in vLLM's form (`vllm.entrypoints.scale_out.token_in_token_out`), for programs
that render and read text elsewhere."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from zfabric.client.results import Completion
from zfabric.errors import FabricError, RequestError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.sampling import StreamOptions, StructuredOutputs, TextFields, text_options
from zfabric.gateway.words import chat_logprobs, usage_object
from zfabric.wire.payloads import Delta, Logprob, TokenLogprobs


class SamplingParams(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's `SamplingParams`, as far as the fabric knows them. Without `max_tokens` an answer takes what the context leaves."""

    bad_words: list[str] | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class TokensRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body. Without `model` it is the one that is served, if there is one alone."""

    token_ids: list[int]
    sampling_params: SamplingParams
    model: str | None = None
    output_mode: Literal["tokens", "text"] = "tokens"
    priority: int | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: float | None = None


_DECODER: Final = decoder(TokensRequest)
_OWN: Final = ("logprobs", "max_tokens")


async def generate(call: Call) -> None:
    """Answer a call."""
    request = decode(_DECODER, call.body)
    model = request.model or await _only_model(call)
    call.check_model(model)
    options = tokens_options(request, model)
    wording = TokensWording(request, model, request.request_id or call.id)
    await answer(call, [Ask(model, None, options)], wording, stream=bool(request.stream))


ENDPOINTS: Final = (Endpoint("POST", "/inference/v1/generate", generate),)


def tokens_options(request: TokensRequest, model: str) -> dict[str, Any]:
    """The options of `AsyncClient.stream`. Raises: RequestError: Fields contradict one another, or are none of the fabric's."""
    sampling = msgspec.structs.asdict(request.sampling_params)
    own = {name: sampling.pop(name) for name in _OWN}
    fields = TextFields(
        model=model, stream=request.stream, stream_options=request.stream_options, priority=request.priority,
        timeout=request.timeout, **sampling,
    )  # fmt: skip
    options = text_options(fields) | {"prompt_token_ids": request.token_ids, "max_tokens": own["max_tokens"]}
    if own["logprobs"] is not None:
        options["logprobs"] = own["logprobs"]
    return options


async def _only_model(call: Call) -> str:
    models = await call.unless_left(call.client.models())
    if len(models) != 1:
        raise RequestError(f"'model' is missing, {len(models)} models are served", parameter="model")
    return models[0].name


class TokensWording:
    """How an answer reads, as a stream and whole."""

    def __init__(self, request: TokensRequest, model: str, name: str) -> None:
        self._name = name
        self._model = model
        self._texts = request.output_mode == "text"
        self._mode = request.output_mode
        self._top = request.sampling_params.logprobs
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._prompt = request.token_ids if request.return_token_ids else None
        self._prompt_told = self._prompt is None

    def delta(self, position: int, delta: Delta) -> bytes:
        if not delta.token_ids and delta.finish_reason is None and not (self._texts and delta.text):
            return b""
        choice = self._choice(delta.index, delta.text, delta.token_ids, delta.finish_reason, delta.logprobs)
        said: dict[str, Any] = {"request_id": self._name, "output_mode": self._mode, "choices": [choice], "usage": None}
        if not self._prompt_told:
            self._prompt_told = True
            said["prompt_token_ids"] = self._prompt
        return sse.event(said)

    def ending(self, completions: list[Completion]) -> bytes:
        if not self._usage:
            return sse.DONE
        said = {"request_id": self._name, "output_mode": self._mode, "choices": [], "usage": usage_object(completions)}
        return sse.event(said) + sse.DONE

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        [completion] = completions
        choices = [
            self._choice(choice.index, choice.text, choice.token_ids, choice.finish_reason, choice.logprobs)
            for choice in completion.choices
        ]
        prompt = completion.prompt_logprobs
        return sse.encode(
            {
                "request_id": self._name,
                "output_mode": self._mode,
                "model": self._model,
                "created": created(),
                "choices": choices,
                "usage": usage_object(completions),
                "prompt_token_ids": self._prompt,
                "prompt_logprobs": None if prompt is None else [_ranked(entry) for entry in prompt],
            }
        )

    def _choice(
        self, index: int, text: str, token_ids: list[int], finished: str | None, logprobs: list[TokenLogprobs] | None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {
            "index": index, "token_ids": token_ids, "finish_reason": finished, "logprobs": self._logprobs(logprobs),
        }  # fmt: skip
        return {**said, "text": text} if self._texts else said

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if entries is None or self._top is None:
            return None
        if self._texts:
            return chat_logprobs(entries, self._top)
        content = [
            {**_entry(entry.token), "top_logprobs": [_entry(other) for other in entry.top[: self._top]]}
            for entry in entries
        ]
        return {"content": content}


def _entry(logprob: Logprob) -> dict[str, Any]:
    return {"token_id": logprob.token_id, "logprob": logprob.logprob}


def _ranked(entry: TokenLogprobs | None) -> dict[str, Any] | None:
    """Of one token of the prompt: each that was looked at, by its id."""
    if entry is None:
        return None
    told = (*entry.top, entry.token)
    return {str(one.token_id): {"logprob": one.logprob, "decoded_token": one.text} for one in told}
