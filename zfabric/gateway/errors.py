"""Errors of the fabric as HTTP has them: a status, headers, and the body that OpenAI's API gives.

Source of the form: https://platform.openai.com/docs/guides/error-codes. A wrong value is 400 there, never 422.
"""

from __future__ import annotations

import math
import re
from typing import Final

import msgspec

from zfabric import errors
from zfabric.errors import FabricError
from zfabric.limits import RETRY_AFTER_S

#: The closest class of an error's own has the word.
_STATUS: Final[dict[type[FabricError], int]] = {
    errors.RequestError: 400,
    errors.UnknownModelError: 404,
    errors.TooLargeError: 413,
    errors.AccessError: 403,
    errors.AuthenticationError: 401,
    errors.OverloadError: 429,
    errors.RequestCancelledError: 499,
    errors.DeadlineExceededError: 504,
    errors.StoppedByOperatorError: 503,
    errors.UnavailableError: 503,
    errors.WorkerTimeoutError: 504,
    FabricError: 500,
}
#: What OpenAI's API calls an error; the others are called as their class is.
_NAMES: Final[dict[type[FabricError], str]] = {
    errors.UnknownModelError: "model_not_found",
    errors.ContextOverflowError: "context_length_exceeded",
    errors.AuthenticationError: "invalid_api_key",
    errors.IncorrectKeyError: "invalid_api_key",
    errors.OverloadError: "rate_limit_exceeded",
    errors.RateLimitedError: "rate_limit_exceeded",
    errors.QueueFullError: "rate_limit_exceeded",
    errors.QuotaExceededError: "rate_limit_exceeded",
    errors.ParameterRangeError: "invalid_value",
    errors.UnsupportedParameterError: "unsupported_parameter",
}
#: An unknown key and an unknown model are invalid requests in OpenAI's API, told apart by their codes.
_TYPES: Final = {403: "permission_error", 429: "rate_limit_error"}
_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


def status_of(error: FabricError) -> int:
    """The HTTP status of an error.

    Example:
        >>> status_of(zfabric.QueueFullError("the queue of smollm2 is full"))
        429
    """
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def headers_of(error: FabricError) -> list[tuple[bytes, bytes]]:
    """What a response has beside its status: when to come back, where that helps."""
    if status_of(error) in (429, 503) and error.retryable:
        return [(b"retry-after", str(_retry_after_s(error)).encode())]
    return [(b"www-authenticate", b"Bearer")] if status_of(error) == 401 else []


def _retry_after_s(error: FabricError) -> int:
    # Whole seconds, not earlier than what was said.
    told_ms = error.details.get("retry_after_ms")
    return max(RETRY_AFTER_S, math.ceil(told_ms / 1_000)) if isinstance(told_ms, (int, float)) else RETRY_AFTER_S


def error_object(error: FabricError, status: int | None = None) -> dict[str, object]:
    """The object that OpenAI's API has under "error", and the fabric's own code beside it."""
    status = status or status_of(error)
    kind = type(error)
    name = _NAMES.get(kind) or _WORDS.sub("_", kind.__name__.removesuffix("Error")).lower()
    message = error.message
    if isinstance(error, errors.ContextOverflowError) and "context_length" in error.details:
        # Programs know OpenAI's sentence, and shorten their prompts when they read it.
        message = f"this model's maximum context length is {error.details['context_length']} tokens: {message}"
    return {
        "message": message,
        "type": _TYPES.get(status, "invalid_request_error" if status < 499 else "server_error"),
        "param": error.details.get("parameter"),
        "code": name,
        "fabric_code": error.code,
        "retryable": error.retryable,
    }


def error_body(error: FabricError, status: int, _request_id: str = "") -> bytes:
    """A whole response: the form of OpenAI's API, which names the request in a header alone."""
    return msgspec.json.encode({"error": error_object(error, status)})
