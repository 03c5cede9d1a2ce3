"""What went wrong upstream, as the fabric's errors; and how long to wait before trying again."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final

from zfabric.errors import (
    AuthenticationError,
    BackendError,
    ContextOverflowError,
    FabricError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RequestError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    UnsupportedOperationError,
    WorkerTimeoutError,
)

#: Answers that another try may better.
RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: A server's message is for people; more than this is a page of HTML.
_MESSAGE_LENGTH_MAX: Final = 2_000
#: First wait before another try, without jitter; each further one doubles.
BACKOFF_S: Final = 0.2
#: An upstream that asks for a longer wait is not waited for: the caller hears of it instead.
RETRY_AFTER_MAX_S: Final = 20.0
_BY_STATUS: Final[dict[int, type[FabricError]]] = {
    400: RequestError,
    401: AuthenticationError,
    402: QuotaExceededError,
    403: PermissionDeniedError,
    404: UnknownModelError,
    405: UnsupportedOperationError,
    408: WorkerTimeoutError,
    413: TooLargeError,
    422: RequestError,
    424: BackendError,
    429: RateLimitedError,
    502: UnavailableError,
    503: UnavailableError,
    504: WorkerTimeoutError,
}
_CONTEXT_SIGNS: Final = (
    "context length", "context_length", "maximum context", "max_model_len", "too many tokens",
    # Text generation inference.
    "must have less than", "`inputs` tokens",
)  # fmt: skip
#: How text generation inference calls its errors: in a stream all of them come as events, after a status of 200.
_BY_TYPE: Final[dict[str, type[FabricError]]] = {
    "overloaded": RateLimitedError,
    "validation": RequestError,
    "template_error": RequestError,
    "missing_template_variable": RequestError,
    "tool_error": RequestError,
}


def redacted(text: str, secrets: Sequence[str]) -> str:
    """The text without the token and the headers' values."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return text


def from_status(status: int, body: bytes, model: str, secrets: Sequence[str]) -> FabricError:
    """The error of an answer that is not 2xx, with the server's own message."""
    # Cut after secrets are removed, or half of one could stay.
    message = redacted(_message(body), secrets)[:_MESSAGE_LENGTH_MAX] or "no message"
    kind = _BY_STATUS.get(status) or (BackendError if status >= 500 or status < 400 else RequestError)
    return _refined(kind, message)(f"upstream of {model!r} answered {status}: {message}", status=status, model=model)


def from_event(event: dict[str, Any], model: str, secrets: Sequence[str]) -> FabricError:
    """The error that a server tells of inside of a stream."""
    told = event.get("error")
    inner = told if isinstance(told, dict) else event
    code = inner.get("code", event.get("status_code"))
    message = redacted(_text_of(event), secrets)[:_MESSAGE_LENGTH_MAX]
    kind = _BY_STATUS.get(code) if isinstance(code, int) else _BY_TYPE.get(str(event.get("error_type")))
    return _refined(kind or BackendError, message)(
        f"upstream of {model!r} failed in its stream: {message}", model=model
    )


def _refined(kind: type[FabricError], message: str) -> type[FabricError]:
    """Servers have no status of its own for a prompt that is too long."""
    overflows = kind in (RequestError, TooLargeError) and any(sign in message.lower() for sign in _CONTEXT_SIGNS)
    return ContextOverflowError if overflows else kind


def retry_after_s(value: str | None, date: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, None if it asks none.

    Args:
        value: The header: a number of seconds, or a date.
        date: The answer's Date header. A date is taken against it, the server's own clock, so that ours may be wrong.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        then, now = _unix_s(value), _unix_s(date)
        if then is None or now is None:
            return None
        seconds = then - now
    return max(0.0, seconds) if seconds == seconds else None


def _unix_s(date: str | None) -> float | None:
    try:
        moment = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()


def backoff_s(attempt: int, asked_s: float | None, rng: random.Random) -> float | None:
    """How long to wait after failure number `attempt` (from 0); None to give up, since the server asks for too much."""
    if asked_s is not None:
        return None if asked_s > RETRY_AFTER_MAX_S else asked_s + rng.uniform(0, BACKOFF_S)
    return rng.uniform(0.5, 1.0) * BACKOFF_S * 2.0**attempt


def _message(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        return _text_of(json.loads(text))
    except (ValueError, RecursionError):
        return text.strip()


def _text_of(value: Any) -> str:
    """The sentence in one of the shapes that servers give it."""
    if isinstance(value, dict):
        for key in ("error", "message", "detail"):
            if value.get(key):
                return _text_of(value[key])
    return value if isinstance(value, str) else json.dumps(value)
