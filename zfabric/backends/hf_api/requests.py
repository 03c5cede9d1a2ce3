"""What is asked of an upstream: paths and bodies of each protocol, with every parameter mapped or refused by name."""

from __future__ import annotations

from typing import Any, Final

from zfabric.backends.front.bounds import image_parts
from zfabric.backends.front.media import with_addresses
from zfabric.backends.hf_api.extra import INCLUDE_STOP, fields_of
from zfabric.backends.hf_api.models_file import Server, Upstream
from zfabric.errors import UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.chat import OPTIONS, ChatOptions, Message
from zfabric.wire.payloads import GenerateRequest

_COMMON: Final = frozenset({"temperature", "top_p", "max_new_tokens", "stop", "seed"})
_OPENAI: Final = _COMMON | {"presence_penalty", "frequency_penalty", "n", "logprobs", "logit_bias"}
#: What is left of it where the model thinks before it answers. Stop strings are applied here alone.
_REASONING: Final = frozenset({"max_new_tokens", "stop", "seed"})
#: What each server honours. The server of transformers takes others too, without effect or with another meaning.
_BY_SERVER: Final[dict[Server, frozenset[str]]] = {
    "openai": _OPENAI,
    "transformers": _COMMON,
    "vllm": _OPENAI
    | {
        "top_k", "min_p", "repetition_penalty", "min_new_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
        "bad_words", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    },
    "tgi": _COMMON
    | {
        "top_k", "typical_p", "repetition_penalty", "frequency_penalty", "logprobs", "guided_json", "guided_regex",
    },
}  # fmt: skip
#: Where vLLM has them by the same or another name.
_VLLM: Final = {
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos", "skip_special_tokens": "skip_special_tokens",
    "bad_words": "bad_words",
}  # fmt: skip
_GUIDES: Final = ("json", "regex", "choice", "grammar")
#: Text generation inference takes no more stop strings than this by default; more are applied here alone.
_TGI_STOPS_MAX: Final = 4


#: How tools are called, and which servers know it.
_CALLING: Final = ("tool_choice", "parallel_tool_calls")
_CALLING_SERVERS: Final = frozenset({"openai", "vllm", "tgi"})
#: What a chat template is told beside messages and tools.
_TEMPLATE: Final = frozenset(OPTIONS) - {"tools", "response_format", *_CALLING}


def parameters_of(upstream: Upstream) -> frozenset[str]:
    """Sampling parameters that are honoured for this model."""
    if not upstream.generates:
        return frozenset()
    known = _REASONING if upstream.reasoning else _BY_SERVER[upstream.server]
    return known if upstream.parameters is None else known & set(upstream.parameters)


def options_for(upstream: Upstream, *, templated: bool) -> frozenset[str]:
    """Which of `OPTIONS` are honoured for this model.

    Args:
        templated: Whether messages become a prompt here, with the model's own tokenizer.
    """
    if upstream.protocol == "chat":
        # The others have no place for what a template is told.
        calling = _CALLING if upstream.server in _CALLING_SERVERS else ()
        return frozenset({"tools", "response_format", *calling, *(_TEMPLATE if upstream.server == "vllm" else ())})
    return frozenset({"tools", *_TEMPLATE}) if templated else frozenset()


def path_of(upstream: Upstream) -> str:
    """Relative to base_url."""
    paths = {
        "chat": "/chat/completions", "completions": "/completions", "embeddings": "/embeddings", "tei": "/embed",
    }  # fmt: skip
    return paths.get(upstream.protocol, "")


def as_chat(prompt: str) -> list[Message]:
    """A prompt, where only chats are spoken."""
    return [{"role": "user", "content": prompt}]


def tells_tokens(upstream: Upstream) -> bool:
    """Whether answers carry true token ids."""
    return upstream.generates and upstream.server in ("vllm", "tgi")


def body_of(
    upstream: Upstream, request: GenerateRequest, prompt: list[int] | None, *, goes_on: bool = False
) -> dict[str, Any]:
    """The body of a streaming request.

    Args:
        upstream: Who is asked.
        request: What for.
        prompt: Replaces the request's own where it is known in tokens.
        goes_on: The prompt holds the tokens of the answer that its reader has.

    Raises:
        UnsupportedOperationError: This protocol has no place for this kind of prompt.
        TooLargeError: There are too many images.
        UnsupportedParameterError: This protocol cannot say that only the context bounds an answer; or see `fields_of`.
    """
    if upstream.protocol == "tgi":
        _refuse(upstream, request, *OPTIONS)
        return _tgi(upstream, request)
    body: dict[str, Any] = {"model": upstream.model, "stream": True}
    if upstream.protocol == "chat":
        image_parts(request.messages or ())
        body["messages"] = with_addresses(request.messages or as_chat(_text(upstream, request.prompt)))
        if request.tools:
            body["tools"] = request.tools
        if request.response_format:
            body["response_format"] = request.response_format
        body |= _told(request.chat)
    else:
        # Tools are in a prompt that was made of messages here.
        _refuse(upstream, request, "response_format", *(() if prompt is not None else ("tools",)))
        body["prompt"] = prompt if prompt is not None else _text(upstream, request.prompt)
    if upstream.server != "transformers":
        body["stream_options"] = {"include_usage": True}
    body.update(_sampling(upstream, request))
    _bound(upstream, body, prompt, len(request.resume_token_ids) if goes_on else 0)
    return body | fields_of(upstream, request.extra, body)


def _bound(upstream: Upstream, body: dict[str, Any], prompt: list[int] | None, drawn: int) -> None:
    """Length of the answer, in the body: without `drawn` tokens, and not beyond what the context leaves.

    Servers refuse more than their context has room for, where all other backends end with what fits.
    """
    for name, least in (("max_tokens", 1), ("min_tokens", 0)):
        if name in body:
            body[name] = max(least, body[name] - drawn)
    if prompt is not None and upstream.context_length:
        room = max(1, upstream.context_length - len(prompt))
        body["max_tokens"] = min(body.get("max_tokens", room), room)
    elif upstream.protocol == "completions" and "max_tokens" not in body:
        # Left out, it means 16 there.
        raise UnsupportedParameterError(
            f"max_new_tokens=None needs a tokenizer and the context_length of model {upstream.name!r}",
            parameter="max_new_tokens",
        )


def _sampling(upstream: Upstream, request: GenerateRequest) -> dict[str, Any]:
    """Of the OpenAI protocols. What is set is said, also where it changes nothing: servers have defaults of their own.

    Raises:
        UnsupportedParameterError: It says how a model is to draw that lets nobody say so.
    """
    sampling = request.sampling
    for name in sampling.changed() if upstream.reasoning else ():
        if name not in _REASONING:
            raise UnsupportedParameterError(
                f"parameter {name!r} is not supported by model {upstream.name!r}, which thinks before it answers",
                parameter=name,
            )
    drawn = () if upstream.reasoning else ("temperature", "top_p")
    values = {name: getattr(sampling, name) for name in drawn if name not in sampling.unset}
    if sampling.max_new_tokens is not None and not (upstream.protocol == "chat" and "max_new_tokens" in sampling.unset):
        # Completions end after 16 tokens where nothing is said, which nobody means.
        values["max_completion_tokens" if upstream.reasoning else "max_tokens"] = sampling.max_new_tokens
    if _sent_stops(upstream, request) and not upstream.reasoning:
        values["stop"] = list(sampling.stop)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            values[name] = getattr(sampling, name)
    if sampling.seed is not None:
        values["seed"] = sampling.seed
    if sampling.n != 1:
        values["n"] = sampling.n
    if sampling.logit_bias:
        values["logit_bias"] = {
            # JSON has no infinity, and these servers no lower value.
            str(token): max(bias, -100.0)
            for token, bias in sampling.logit_bias.items()
        }
    if sampling.logprobs is not None:
        chat = upstream.protocol == "chat"
        values |= {"logprobs": True, "top_logprobs": sampling.logprobs} if chat else {"logprobs": sampling.logprobs}
    if upstream.server == "vllm":
        values["return_token_ids"] = True
        if sampling.logprobs is not None and upstream.tokenizer is not None:
            # By their ids alternatives are told apart; their texts come from the tokenizer.
            values["return_tokens_as_token_ids"] = True
        changed = set(sampling.changed())
        values |= {theirs: getattr(sampling, ours) for ours, theirs in _VLLM.items() if ours in changed}
        guides = {kind: guide for kind in _GUIDES if (guide := getattr(sampling, f"guided_{kind}"))}
        if guides:
            values["structured_outputs"] = guides
    return values


def _sent_stops(upstream: Upstream, request: GenerateRequest) -> bool:
    """Whether the server is told of stop strings: one that finds them leaves them out of its text."""
    return bool(request.sampling.stop) and upstream.server_stops and not request.extra.get(INCLUDE_STOP)


def _tgi(upstream: Upstream, request: GenerateRequest) -> dict[str, Any]:
    sampling = request.sampling
    values: dict[str, Any] = {"details": True, "return_full_text": False, "do_sample": not sampling.greedy}
    if not sampling.greedy:
        values |= {} if "temperature" in sampling.unset else {"temperature": sampling.temperature}
        # The server takes masses below 1 only; 1 is its default.
        values |= {name: getattr(sampling, name) for name in ("top_p", "typical_p") if getattr(sampling, name) < 1}
        values |= {"top_k": sampling.top_k} if sampling.top_k > 0 else {}
    values["max_new_tokens"] = sampling.max_new_tokens
    if sampling.seed is not None:
        # Unsigned there.
        values["seed"] = sampling.seed & (2**64 - 1)
    if sampling.repetition_penalty != 1.0:
        values["repetition_penalty"] = sampling.repetition_penalty
    if sampling.frequency_penalty:
        values["frequency_penalty"] = sampling.frequency_penalty
    if _sent_stops(upstream, request) and len(sampling.stop) <= _TGI_STOPS_MAX:
        values["stop"] = list(sampling.stop)
    if sampling.logprobs:
        values["top_n_tokens"] = sampling.logprobs
    for kind in ("json", "regex"):
        if guide := getattr(sampling, f"guided_{kind}"):
            values["grammar"] = {"type": kind, "value": guide}
    values |= fields_of(upstream, request.extra, values)
    return {"inputs": _text(upstream, request.prompt), "parameters": values, "stream": True}


def _text(upstream: Upstream, prompt: str | None) -> str:
    if prompt is None:
        raise UnsupportedOperationError(
            f"model {upstream.name!r} speaks {upstream.protocol}, which takes no such prompt; a tokenizer would help",
            operation="generate",
            model=upstream.name,
        )
    return prompt


def _refuse(upstream: Upstream, request: GenerateRequest, *names: str) -> None:
    """What must not be left out in silence, whoever asks. Raises: UnsupportedOperationError."""
    for name in names:
        if name in request.options:
            raise UnsupportedOperationError(
                f"{name} is not supported by model {upstream.name!r}, which speaks {upstream.protocol}",
                operation=name,
                model=upstream.name,
            )


def _told(chat: ChatOptions | None) -> dict[str, Any]:
    """What the server's template is to be told."""
    if chat is None:
        return {}
    calling = {name: getattr(chat, name) for name in chat.set if name in _CALLING}
    told = {name: getattr(chat, name) for name in chat.set if name in _TEMPLATE}
    if told:
        told["add_generation_prompt"] = chat.arguments["add_generation_prompt"]
    return {**calling, **told}
