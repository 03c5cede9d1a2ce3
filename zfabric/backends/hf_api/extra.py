"""What a server alone knows: into the bodies of requests, and out of its events."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Final

from zfabric.backends.hf_api.models_file import Upstream
from zfabric.errors import RequestError, UnsupportedParameterError
from zfabric.wire.chat import OPTIONS
from zfabric.wire.extra import COMMON

#: Done here, whatever the server is: stop strings are looked for in its text.
INCLUDE_STOP: Final = "include_stop"
#: What the keys of one meaning are called by vLLM's server. Others have none of them.
_VLLM: Final = {
    "cache_salt": "cache_salt", "kv_transfer_params": "kv_transfer_params", "allowed_token_ids": "allowed_token_ids",
    "extra_args": "vllm_xargs",
}  # fmt: skip
#: Fields of bodies that say what the request itself says, or what the worker needs to read the answer.
_OWN: Final = frozenset(
    {
        "model", "stream", "stream_options", "messages", "prompt", "inputs", "parameters", "temperature", "top_p", "top_k",
        "min_p", "typical_p", "max_tokens", "max_new_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n",
        "best_of", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "bad_words", "skip_special_tokens", "structured_outputs", "grammar",
        "return_token_ids", "return_tokens_as_token_ids", "details", "return_full_text", "do_sample", "top_n_tokens",
        "include_stop_str_in_output", *OPTIONS,
    }
)  # fmt: skip
#: Fields of events that are told by other means, were asked for by the worker itself, or are padding.
_NOT_TOLD: Final = frozenset(
    {
        "id", "object", "created", "model", "choices", "usage", "error", "prompt_token_ids", "prompt_text", "obfuscation",
    }
)  # fmt: skip


def fields_of(upstream: Upstream, extra: dict[str, Any], body: Collection[str]) -> dict[str, Any]:
    """What is put into a body beside what the worker says.

    Args:
        extra: Of the request.
        body: Names that the body has already.

    Raises:
        UnsupportedParameterError: A key that the server has not got, or that is a matter of the request's own parameters.
        RequestError: A value that JSON has not got.
    """
    found: dict[str, Any] = {}
    for name, value in extra.items():
        if name == INCLUDE_STOP:
            continue
        theirs = name
        if name in COMMON:
            theirs = _VLLM.get(name, "") if upstream.server == "vllm" else ""
            if not theirs:
                raise _refused(name, f"is not known to model {upstream.name!r}, whose server is {upstream.server}")
        elif name in _OWN or name in body:
            raise _refused(name, "says what the request's own parameters, or the worker, say: give it as a parameter")
        found[theirs] = value
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"extra cannot be sent to model {upstream.name!r} as JSON: {error}") from None
    return found


def _refused(name: str, why: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(f"extra {name!r} {why}", parameter=name)


class Told:
    """What a server's events say besides, each value once."""

    __slots__ = ("_known", "_new")

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._new: dict[str, Any] = {}

    def read(self, event: dict[str, Any]) -> None:
        """Note what is new in an event."""
        for name, value in event.items():
            if name not in _NOT_TOLD and value is not None and self._known.get(name) != value:
                self._known[name] = self._new[name] = value

    def take(self) -> dict[str, Any] | None:
        """What is new since the last call; None for nothing."""
        new, self._new = self._new, {}
        return new or None
