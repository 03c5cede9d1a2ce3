"""What all APIs that make text have in common: the fields, and what they are called in the fabric.

Fields are those of OpenAI's API reference (https://platform.openai.com/docs/api-reference) and, below them, those that vLLM's
server adds (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). A field that neither the client library
nor the model knows is refused by name.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.errors import ParameterRangeError, RequestError
from zfabric.gateway.affinity import affinity_of


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How a stream is written.

    Attributes:
        include_usage: A last chunk has the counts of tokens.
        include_obfuscation: Accepted; nothing is padded here.
        continuous_usage_stats: Of vLLM: every chunk has the counts so far.
    """

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool = False


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's form of what a text has to follow; one of them."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class TextFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of every request for text. None is what was not given."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Accepted, and without effect on the answer.
    metadata: dict[str, str] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    # vLLM's, and the fabric's own.
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    best_of: int | None = None
    cache_salt: str | None = None
    detokenize: bool | None = None
    extra: dict[str, Any] | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    kv_transfer_params: dict[str, Any] | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    priority: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: float | None = None
    top_k: int | None = None
    truncate_prompt: bool | None = None
    typical_p: float | None = None
    use_beam_search: bool | None = None
    vllm_xargs: dict[str, Any] | None = None


#: Fields that go to the client library under their own names, and under others.
_SAME: Final = (
    "bad_words", "best_of", "frequency_penalty", "guided_choice", "guided_grammar", "guided_regex", "ignore_eos", "min_p", "n",
    "presence_penalty", "priority", "prompt_logprobs", "repetition_penalty", "seed", "skip_special_tokens", "stop",
    "stop_token_ids", "temperature", "timeout", "top_k", "top_p", "truncate_prompt", "typical_p", "use_beam_search",
)  # fmt: skip
_RENAMED: Final = {"min_tokens": "min_new_tokens"}
#: Fields that are keys of the library's `extra`, and what they are called there.
_EXTRA: Final = {
    "allowed_token_ids": "allowed_token_ids", "cache_salt": "cache_salt", "detokenize": "detokenize",
    "include_stop_str_in_output": "include_stop", "kv_transfer_params": "kv_transfer_params", "vllm_xargs": "extra_args",
}  # fmt: skip
#: OpenAI's own; the fabric takes more.
_STOPS_MAX: Final = 4
#: Values of them that say what holds anyway: they need no engine that knows them.
_EXTRA_USUAL: Final = {"detokenize": True, "include_stop_str_in_output": False}


def text_options(request: TextFields) -> dict[str, Any]:
    """The options of `AsyncClient.stream` for what was given, but for the prompt and the length.

    Raises:
        RequestError: Fields contradict one another.
        ParameterRangeError: A value can be none of the fabric's.
    """
    options = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    for name, ours in _RENAMED.items():
        if (value := getattr(request, name)) is not None:
            options[ours] = value
    if request.prompt_cache_key:
        options["affinity"] = affinity_of(request.prompt_cache_key)
    if extra := _extra(request):
        options["extra"] = extra
    if request.logit_bias:
        options["logit_bias"] = _biases(request.logit_bias)
    if request.guided_json is not None:
        options["guided_json"] = _schema(request.guided_json)
    wanted = request.structured_outputs
    if wanted is not None:
        _add_structured(options, wanted)
    if request.response_format is not None and request.response_format.get("type") != "text":
        options["response_format"] = request.response_format
    if request.stream_options is not None:
        _check_stream_options(request)
    return options


def check_stops(request: TextFields) -> None:
    """OpenAI's API takes four stop strings. Raises: ParameterRangeError: There are more."""
    if isinstance(request.stop, list) and len(request.stop) > _STOPS_MAX:
        raise ParameterRangeError(f"stop has {len(request.stop)} texts, limit is {_STOPS_MAX}", parameter="stop")


def _extra(request: TextFields) -> dict[str, Any]:
    """What one engine alone knows. Raises: RequestError: It is said by both of its names."""
    found = dict(request.extra or {})
    for name, ours in _EXTRA.items():
        value = getattr(request, name)
        if value is None or value == _EXTRA_USUAL.get(name):
            continue
        if ours in found:
            raise RequestError(f"{name} is given beside extra.{ours}, give one", parameter=name)
        found[ours] = value
    return found


def _check_stream_options(request: TextFields) -> None:
    if not request.stream:
        raise RequestError("stream_options is given without stream", parameter="stream_options")


def _add_structured(options: dict[str, Any], wanted: StructuredOutputs) -> None:
    if wanted.json is not None:
        options["guided_json"] = _schema(wanted.json)
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(wanted, name)) is not None:
            options[f"guided_{name}"] = value
    if wanted.json_object:
        options["response_format"] = {"type": "json_object"}


def _schema(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()


def _biases(biases: dict[str, float]) -> dict[int, float]:
    """JSON has texts as keys; these are token ids. Raises: ParameterRangeError: One is not."""
    for token in biases:
        if not (token.isascii() and token.isdigit()):
            raise ParameterRangeError(f"logit_bias has {token!r}, it must have token ids", parameter="logit_bias")
    return {int(token): bias for token, bias in biases.items()}
