"""Inputs as OpenAI's API takes them: a text, tokens, or a list of either."""

from __future__ import annotations

from typing import cast

from zfabric.errors import ParameterRangeError, RequestError, TooLargeError
from zfabric.limits import GATEWAY_INPUTS_MAX

Inputs = str | list[str | int | list[int]]


def inputs_of(name: str, given: Inputs) -> list[str | list[int]]:
    """Each input by itself: a list of numbers is one.

    Raises:
        RequestError: There is none.
        ParameterRangeError: Numbers and others are mixed.
        TooLargeError: There are too many.

    Example:
        >>> inputs_of("input", [1, 2, 3])
        [[1, 2, 3]]
    """
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError(f"{name} is empty", parameter=name)
    numbers = sum(isinstance(item, int) for item in given)
    if numbers == len(given):
        return [cast("list[int]", given)]
    if numbers:
        raise ParameterRangeError(f"{name} mixes tokens with texts or lists, it must be of one kind", parameter=name)
    if len(given) > GATEWAY_INPUTS_MAX:
        raise TooLargeError(
            f"{name} has {len(given)} inputs, limit is {GATEWAY_INPUTS_MAX}", parameter=name, limit=GATEWAY_INPUTS_MAX
        )
    return cast("list[str | list[int]]", given)
