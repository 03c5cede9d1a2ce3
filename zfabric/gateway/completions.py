"""OpenAI's older /v1/completions (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from zfabric.client.results import Choice, Completion
from zfabric.errors import FabricError, RequestError, UnsupportedParameterError
from zfabric.gateway import sse
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.counts import RunningUsage, running_usage
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.generation import Ask, answer
from zfabric.gateway.inputs import Inputs, inputs_of
from zfabric.gateway.lengths import check_lengths
from zfabric.gateway.sampling import TextFields, check_stops, text_options
from zfabric.gateway.together import together
from zfabric.gateway.words import OldLogprobs, all_besides, besides, stopped_by, usage_object
from zfabric.wire.payloads import Delta

#: OpenAI's own, of this API alone.
_DEFAULT_MAX_TOKENS: Final = 16


class CompletionRequest(TextFields, forbid_unknown_fields=True, kw_only=True):
    """The body. Fields beside OpenAI's own are vLLM's."""

    prompt: Inputs
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


_DECODER: Final = decoder(CompletionRequest)


async def completions(call: Call) -> None:
    """Answer a call: one request to the fabric for each prompt."""
    request = decode(_DECODER, call.body)
    call.check_model(request.model)
    if request.echo and request.max_tokens == 0:
        await prompts_alone(call, request)
        return
    options = completion_options(request)
    asks = _asks(request, options)
    await check_lengths(call, asks)
    wording = CompletionWording(request, f"cmpl-{call.id}", await running_usage(call, request, asks))
    await answer(call, asks, wording, stream=bool(request.stream))


async def prompts_alone(call: Call, request: CompletionRequest) -> None:
    """Give prompts back, without a new token: the fabric is asked for one, which is left out."""
    if request.truncate_prompt:
        raise RequestError(
            "truncate_prompt is given beside echo, and max_tokens is 0: there is nothing to make room for",
            parameter="truncate_prompt",
        )
    options = completion_options(msgspec.structs.replace(request, max_tokens=1))
    # Texts are as the caller wrote them, and scores those of the prompt.
    del options["echo"]
    options.pop("logprobs", None)
    asks = _asks(request, options)
    texts = await call.unless_left(together(_text(call, request.model, prompt) for prompt in _prompts(request)))
    running = await running_usage(call, request, asks)
    await answer(call, asks, PromptWording(request, f"cmpl-{call.id}", running, texts), stream=bool(request.stream))


async def _text(call: Call, model: str, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await call.client.detokenize(model, prompt)


def _prompts(request: CompletionRequest) -> Sequence[str | list[int]]:
    return inputs_of("prompt", request.prompt)


def _asks(request: CompletionRequest, options: dict[str, Any]) -> list[Ask]:
    return [
        Ask(request.model, prompt, options)
        if isinstance(prompt, str)
        else Ask(request.model, None, {**options, "prompt_token_ids": prompt})
        for prompt in _prompts(request)
    ]


ENDPOINTS: Final = (Endpoint("POST", "/v1/completions", completions),)


def completion_options(request: CompletionRequest) -> dict[str, Any]:
    """The options of `AsyncClient.stream`. Raises: RequestError: Fields contradict one another, or are none of the fabric's."""
    if request.suffix:
        raise UnsupportedParameterError("'suffix' is not supported: no model fills in the middle", parameter="suffix")
    check_stops(request)
    options = text_options(request)
    options["max_tokens"] = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if request.echo:
        options["echo"] = True
    if request.logprobs is not None:
        options["logprobs"] = request.logprobs
        if request.echo:
            options.setdefault("prompt_logprobs", request.logprobs)
    return options


class CompletionWording:
    """How answers read, as a stream and whole."""

    def __init__(self, request: CompletionRequest, name: str, running: RunningUsage | None = None) -> None:
        self._request = request
        self._running = running
        self._n = request.n or 1
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        self._head = {"id": name, "object": "text_completion", "created": created(), "model": request.model}
        self._plain = request.logprobs is None and not request.return_token_ids and running is None
        self._texts: dict[int, sse.TextEvents] = {}
        self._logprobs: dict[int, OldLogprobs] = {}

    def delta(self, position: int, delta: Delta) -> bytes:
        index = position * self._n + delta.index
        if self._plain and delta.finish_reason is None and not delta.extra:
            return self._events_of(index).of(delta.text) if delta.text else b""
        choice: dict[str, Any] = {
            "index": index, "text": delta.text, "logprobs": self._logprobs_of(index, delta),
            "finish_reason": delta.finish_reason, **stopped_by(delta),
        }  # fmt: skip
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        usage: dict[str, Any] = {"usage": None} if self._usage else {}
        if self._running is not None:
            usage = {"usage": self._running.of(position, delta.index, delta)}
        return sse.event({**self._head, "choices": [choice], **usage, **besides(delta.extra or {})})

    def ending(self, completions: list[Completion]) -> bytes:
        if not self._usage:
            return sse.DONE
        return sse.event({**self._head, "choices": [], "usage": usage_object(completions)}) + sse.DONE

    def failure(self, error: FabricError) -> bytes:
        return sse.failure(error)

    def whole(self, completions: list[Completion]) -> bytes:
        choices = [
            self._choice(position * self._n + choice.index, choice, completion)
            for position, completion in enumerate(completions)
            for choice in completion.choices
        ]
        return sse.encode(
            {**self._head, "choices": choices, "usage": usage_object(completions), **all_besides(completions)}
        )

    def _events_of(self, index: int) -> sse.TextEvents:
        events = self._texts.get(index)
        if events is None:
            head = sse.encode(self._head)[:-1] + b',"choices":[{"index":%d,"text":' % index
            usage = b',"usage":null' if self._usage else b""
            events = self._texts[index] = sse.TextEvents(
                head, b',"logprobs":null,"finish_reason":null}]' + usage + b"}"
            )
        return events

    def _logprobs_of(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        words = self._logprobs.get(index)
        entries = delta.logprobs or []
        if words is None:
            words = self._logprobs[index] = OldLogprobs()
            if self._request.echo:
                return words.of([*(delta.prompt_logprobs or ()), *entries], delta.text)
        return words.of(entries)

    def _choice(self, index: int, choice: Choice, completion: Completion) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None:
            before = completion.prompt_logprobs if self._request.echo else None
            logprobs = OldLogprobs().of([*(before or ()), *(choice.logprobs or ())], choice.text)
        said: dict[str, Any] = {
            "index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason,
            **stopped_by(choice),
        }  # fmt: skip
        return {**said, "token_ids": choice.token_ids} if self._request.return_token_ids else said


class PromptWording(CompletionWording):
    """How prompts read that are given back alone: what the fabric drew for them is left out.

    Args:
        texts: Of the prompts.
    """

    def __init__(
        self, request: CompletionRequest, name: str, running: RunningUsage | None, texts: Sequence[str]
    ) -> None:
        super().__init__(request, name, running)
        self._prompts = texts

    def delta(self, position: int, delta: Delta) -> bytes:
        return b""

    def ending(self, completions: list[Completion]) -> bytes:
        given, events = self._given(completions), b""
        for position, completion in enumerate(given):
            for choice in completion.choices:
                said = self._choice(position * self._n + choice.index, choice, completion)
                usage: dict[str, Any] = {"usage": None} if self._usage else {}
                if self._running is not None:
                    usage = {"usage": self._running.of(position, choice.index)}
                events += sse.event({**self._head, "choices": [said], **usage})
        return events + super().ending(given)

    def whole(self, completions: list[Completion]) -> bytes:
        return super().whole(self._given(completions))

    def _given(self, completions: list[Completion]) -> list[Completion]:
        given = []
        for text, completion in zip(self._prompts, completions, strict=True):
            choices = [Choice(choice.index) for choice in completion.choices]
            for choice in choices:
                choice.extend(text, [])
                choice.finish_reason = "length"
            usage = msgspec.structs.replace(completion.usage, completion_tokens=0)
            given.append(dataclasses.replace(completion, choices=choices, usage=usage))
        return given
