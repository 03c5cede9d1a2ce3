"""From a caller's arguments to a request, and from a result to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zfabric.errors import ProtocolError, RequestError, UnsupportedParameterError
from zfabric.wire.payloads import ALL_PARAMETERS, EmbedResult, GenerateRequest, Message, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Parameters that take a list; one string or number is a list of one.
_LISTS = ("stop", "stop_token_ids", "bad_words", "guided_choice")


def generate_request(
    prompt: str | None,
    messages: Sequence[Message] | None,
    prompt_token_ids: Sequence[int] | None,
    tools: list[dict[str, Any]] | None,
    response_format: dict[str, Any] | None,
    sampling: dict[str, Any],
) -> GenerateRequest:
    """A checked request.

    Raises:
        UnsupportedParameterError: A name that is no sampling parameter.
        RequestError, ParameterRangeError: None or several prompts, or a value out of range.
    """
    for name in sampling:
        if name not in ALL_PARAMETERS:
            raise UnsupportedParameterError(f"{name!r} is not a sampling parameter", parameter=name)
    for name in _LISTS:
        value = sampling.get(name)
        if isinstance(value, (str, int)):
            sampling[name] = (value,)
        elif isinstance(value, list):
            sampling[name] = tuple(value)
    try:
        request = GenerateRequest(
            prompt=prompt,
            messages=list(messages) if messages is not None else None,
            prompt_token_ids=list(prompt_token_ids) if prompt_token_ids is not None else None,
            sampling=SamplingParams(**sampling),
            tools=tools,
            response_format=response_format,
        )
        request.validate()
    except TypeError as error:
        raise RequestError(f"a parameter has the wrong type: {error}") from None
    return request


def vectors(result: EmbedResult) -> NDArray[np.float32]:
    """The array in a result, without a copy. Raises: ProtocolError if sizes do not fit."""
    import numpy as np

    if len(result.data) != 4 * result.rows * result.dimensions:
        raise ProtocolError(f"{len(result.data)} bytes are not {result.rows} × {result.dimensions} float32 values")
    return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
