"""From a caller's arguments to a request, and from a result to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict

from zfabric.core.pending import Resume
from zfabric.errors import ProtocolError, RequestError, UnsupportedParameterError
from zfabric.wire.payloads import ALL_PARAMETERS, EmbedResult, GenerateRequest, Message, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Parameters that take a list; one string or number is a list of one.
_LISTS: Final = ("stop", "stop_token_ids", "bad_words", "guided_choice")


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `stream` and `generate`.

    Attributes:
        messages, prompt_token_ids: Instead of a prompt. Messages go through the model's chat template.
        deadline_ms: Time for the whole answer; then DeadlineExceededError.
        priority: Lower goes first in the queue; 0 is usual.
        resume: What happens when a worker is lost in mid-stream: see `zfabric.core.pending.Resume`.
        tools, response_format: For chat templates and remote APIs that know them.

    All others are fields of `SamplingParams`, with the defaults that it has.
    """

    messages: Sequence[Message] | None
    prompt_token_ids: Sequence[int] | None
    deadline_ms: int | None
    priority: int
    resume: Resume
    tools: list[dict[str, Any]] | None
    response_format: dict[str, Any] | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_new_tokens: int | None
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    ignore_eos: bool
    seed: int | None
    n: int
    best_of: int | None
    use_beam_search: bool
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    logit_bias: dict[int, float] | None
    bad_words: str | Sequence[str]
    guided_json: str | None
    guided_regex: str | None
    guided_choice: str | Sequence[str]
    guided_grammar: str | None
    truncate_prompt: bool
    skip_special_tokens: bool


class SubmitOptions(TypedDict):
    """What the envelope of a request needs."""

    deadline_ms: int | None
    priority: int
    resume: Resume


def generate_request(prompt: str | None, options: GenerateOptions) -> tuple[GenerateRequest, SubmitOptions]:
    """A request, and how to submit it. Ranges are checked when it is.

    Raises:
        UnsupportedParameterError: A name that is no parameter.
        RequestError: A value that has to be a list, and is none.
    """
    given: dict[str, Any] = dict(options)
    submit = SubmitOptions(
        deadline_ms=given.pop("deadline_ms", None),
        priority=given.pop("priority", 0),
        resume=given.pop("resume", "exact"),
    )
    messages, token_ids = given.pop("messages", None), given.pop("prompt_token_ids", None)
    tools, response_format = given.pop("tools", None), given.pop("response_format", None)
    for name, value in given.items():
        if name not in ALL_PARAMETERS:
            raise UnsupportedParameterError(f"{name!r} is not a parameter of a request", parameter=name)
        if name in _LISTS:
            given[name] = (value,) if isinstance(value, (str, int)) else tuple(value)
    try:
        request = GenerateRequest(
            prompt=prompt,
            messages=list(messages) if messages is not None else None,
            prompt_token_ids=list(token_ids) if token_ids is not None else None,
            sampling=SamplingParams(**given),
            tools=tools,
            response_format=response_format,
        )
    except TypeError as error:
        raise RequestError(f"a parameter has the wrong type: {error}") from None
    return request, submit


def vectors(result: EmbedResult) -> NDArray[np.float32]:
    """The array in a result, without a copy. Raises: ProtocolError if sizes do not fit."""
    import numpy as np

    if len(result.data) != 4 * result.rows * result.dimensions:
        raise ProtocolError(f"{len(result.data)} bytes are not {result.rows} × {result.dimensions} float32 values")
    return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
