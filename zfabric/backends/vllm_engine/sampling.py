"""From the fabric's sampling parameters to vLLM's, one to one."""

from __future__ import annotations

from typing import Any, Final

from zfabric.backends.front.generation_config import GenerationDefaults, read
from zfabric.backends.vllm_engine.compat.sampling import dangerous_fields, sampling_fields, structured_outputs
from zfabric.errors import UnsupportedParameterError
from zfabric.wire.payloads import GenerateRequest

#: The fabric's name → vLLM's.
_FIELDS: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "seed": "seed",
    "n": "n",
    "logprobs": "logprobs",
    "prompt_logprobs": "prompt_logprobs",
    "logit_bias": "logit_bias",
    "bad_words": "bad_words",
    "skip_special_tokens": "skip_special_tokens",
}
#: The same, of keys of a request's `extra`.
_EXTRA: Final = {
    "include_stop": "include_stop_str_in_output",
    "detokenize": "detokenize",
    "allowed_token_ids": "allowed_token_ids",
}
#: The fabric's name → the kind of constraint.
_GUIDES: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
#: Done by the worker itself.
_OWN: Final = frozenset({"echo", "truncate_prompt"})
#: vLLM takes this seed for none; whoever asks for it gets another one, always the same.
_SEED_NONE: Final = -1
_SEED_INSTEAD: Final = 2**62 + 1

#: All that some version of vLLM honours.
PARAMETERS: Final = frozenset(_FIELDS) | frozenset(_GUIDES) | _OWN


def supported(engine: Any) -> frozenset[str]:
    """What the installed version honours, with the engine as it was started."""
    fields = sampling_fields() - dangerous_fields(engine)
    guides = frozenset(_GUIDES) if "structured_outputs" in fields else frozenset()
    return frozenset(name for name, theirs in _FIELDS.items() if theirs in fields) | guides | _OWN


def defaults(engine: Any) -> GenerationDefaults:
    """What the model says of its answers, as far as `--generation-config` has vLLM heed it, and what overrides that."""
    settings = engine.vllm_config.model_config
    config = {} if settings.generation_config == "vllm" else dict(settings.try_get_generation_config())
    return read({**config, **(settings.override_generation_config or {})}, supported(engine))


def translate(request: GenerateRequest, *, drawn: int = 0) -> Any:
    """vLLM's `SamplingParams` of a request.

    Args:
        drawn: Tokens of the answer that the prompt holds already.

    Raises:
        UnsupportedParameterError: A kind of response format that is not known.
        Exception: Whatever vLLM raises for values that it does not take.
    """
    # The package `vllm` itself looks its names up anew each time, which takes longer than all else here.
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as EngineSampling

    sampling = request.sampling
    changed = sampling.changed()
    values = {_FIELDS[name]: _value(name, getattr(sampling, name)) for name in changed if name in _FIELDS}
    values["max_tokens"] = None if sampling.max_new_tokens is None else sampling.max_new_tokens - drawn
    values["min_tokens"] = max(0, sampling.min_new_tokens - drawn)
    if sampling.greedy:
        values["temperature"] = 0.0
    if request.resume_token_ids:
        # The prompt's log-probabilities went out with the first delta.
        values.pop("prompt_logprobs", None)
    values |= _constraint(request) | _extra(request)
    # Made for this request alone, so it need not be copied again.
    return EngineSampling(output_kind=RequestOutputKind.DELTA, skip_clone=True, **values)


def extra_keys(engine: Any) -> list[str]:
    """Keys of a request's `extra` that mean something to the engine as it was started."""
    fields = sampling_fields()
    keys = {name for name, theirs in _EXTRA.items() if theirs in fields} | {"cache_salt"}
    if "extra_args" in fields:
        # Without a connector vLLM would leave them unread.
        keys |= {"extra_args", *(["kv_transfer_params"] if engine.vllm_config.kv_transfer_config is not None else [])}
    return sorted(keys)


def _extra(request: GenerateRequest) -> dict[str, Any]:
    """What only vLLM knows; the salt goes with the prompt."""
    extra = request.extra
    values = {theirs: extra[name] for name, theirs in _EXTRA.items() if name in extra}
    arguments = dict(extra.get("extra_args", {}))
    if "kv_transfer_params" in extra and not request.resume_token_ids:
        # They name what another engine holds for one taker, whom an answer that goes on has had.
        arguments["kv_transfer_params"] = extra["kv_transfer_params"]
    return {**values, "extra_args": arguments} if arguments else values


def _value(name: str, value: Any) -> Any:
    if name == "seed" and value == _SEED_NONE:
        return _SEED_INSTEAD
    return list(value) if isinstance(value, tuple) else value


def _constraint(request: GenerateRequest) -> dict[str, Any]:
    """The guide, or what the response format asks for."""
    for name, kind in _GUIDES.items():
        value = getattr(request.sampling, name)
        if value:
            return structured_outputs(kind, list(value) if kind == "choice" else value)
    wanted = request.response_format
    if not wanted or wanted.get("type") == "text":
        return {}
    if wanted.get("type") == "json_object":
        return structured_outputs("json_object", True)
    if wanted.get("type") == "json_schema":
        schema = wanted.get("json_schema", {})
        return structured_outputs("json", schema.get("schema", schema))
    raise UnsupportedParameterError(
        f"response_format of type {wanted.get('type')!r} is not supported by vllm", parameter="response_format"
    )
