"""What a backend hands over, checked before the rest of the fabric believes it.

A client reads all streams of a message in one pass, so a value of a wrong type in one of them would cost the others
their step. Types are looked at where a delta comes in: numbers of NumPy or torch are taken for the numbers they are, and
anything else ends the stream that it belongs to.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec

from zfabric.errors import BackendError, Detail, FabricError
from zfabric.limits import DETAILS_MAX, MESSAGE_LENGTH_MAX, NAME_LENGTH_MAX
from zfabric.wire.answers import Outcome
from zfabric.wire.payloads import Delta, FinishReason, TokenLogprobs, Usage
from zfabric.wire.plain import ENCODING_ERRORS, encode_plain, plain, plain_integer
from zfabric.wire.tasks import ClassifyResult
from zfabric.wire.tool_calls import ToolCallDelta

_REASONS: Final = frozenset(get_args(FinishReason))
_logprobs: Final = msgspec.msgpack.Decoder(list[TokenLogprobs])
_tool_calls: Final = msgspec.msgpack.Decoder(list[ToolCallDelta] | None)
_told: Final = msgspec.msgpack.Decoder(dict[str, Any] | None)
_prompt_logprobs: Final = msgspec.msgpack.Decoder(list[TokenLogprobs | None])
#: The general error of a backend: its code stands for one that is no code.
_CODE_MAX: Final = 99_999
_INTEGER_MAX: Final = 2**64


def all_integers(values: list[int]) -> bool:
    """Whether these are what they are said to be."""
    for value in values:  # noqa: SIM110 — a generator costs more than what it looks at
        if value.__class__ is not int:
            return False
    return True


def make_plain(delta: Delta) -> None:
    """Turn text, token ids and index into plain values, in place.

    Raises:
        BackendError: They are none.
    """
    if not isinstance(delta, Delta):
        raise BackendError(f"a backend hands over Delta, this is {type(delta).__name__}")
    if not isinstance(delta.text, str):
        raise BackendError(f"text of a delta is of type {type(delta.text).__name__}, it must be str")
    delta.text = str(delta.text)
    try:
        ids: Any = delta.token_ids
        delta.token_ids = [plain_integer(token) for token in (plain(ids) if hasattr(ids, "tolist") else ids)]
        delta.index = plain_integer(delta.index)
    except TypeError as error:
        raise BackendError(f"token ids and index of a delta must be integers: {error}") from None


def check_ending(delta: Delta) -> None:
    """Check the reasons of an end, and its usage. Raises: BackendError: They are not what they have to be."""
    if delta.finish_reason not in _REASONS:
        raise BackendError(
            f"finish_reason of a delta is {delta.finish_reason!r}, it must be one of {', '.join(sorted(_REASONS))}"
        )
    if delta.stop_reason is not None and not isinstance(delta.stop_reason, str):
        try:
            delta.stop_reason = plain_integer(delta.stop_reason)
        except TypeError as error:
            raise BackendError(f"stop_reason of a delta must be a text or a token: {error}") from None
    if delta.usage is not None:
        delta.usage = sound_usage(delta.usage)


def check_logprobs(delta: Delta) -> None:
    """Check log-probabilities. Raises: BackendError: A client could not read them."""
    try:
        if delta.logprobs is not None:
            _logprobs.decode(encode_plain(delta.logprobs))
        if delta.prompt_logprobs is not None:
            _prompt_logprobs.decode(encode_plain(delta.prompt_logprobs))
    except ENCODING_ERRORS as error:
        raise BackendError(f"log-probabilities of a delta cannot be sent: {error}") from None


def check_parts(delta: Delta) -> None:
    """Check reasoning, tool calls and what is told besides. Raises: BackendError: A client could not read them."""
    if not isinstance(delta.reasoning, str):
        raise BackendError(f"reasoning of a delta is of type {type(delta.reasoning).__name__}, it must be str")
    try:
        _tool_calls.decode(encode_plain(delta.tool_calls))
    except ENCODING_ERRORS as error:
        raise BackendError(f"tool_calls of a delta cannot be sent: {error}") from None
    try:
        _told.decode(encode_plain(delta.extra))
    except ENCODING_ERRORS as error:
        raise BackendError(f"extra of a delta cannot be sent: {error}") from None


def sound_usage(usage: Usage) -> Usage:
    """Counts as plain integers. Raises: BackendError: They are none."""
    try:
        prompt, completion, cached = map(
            plain_integer, (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        )
    except (AttributeError, TypeError) as error:
        raise BackendError(f"usage must be counts of tokens: {error}") from None
    if min(prompt, completion, cached) < 0 or max(prompt, completion, cached) >= _INTEGER_MAX:
        raise BackendError(f"usage is {usage!r}, it must be counts of tokens")
    return Usage(prompt, completion, cached, bool(usage.estimated))


def outcome_with(result: object) -> Outcome:
    """The outcome of an operation that is no stream. Raises: BackendError: MessagePack cannot hold its result."""
    rows, labels = (result.probabilities, result.labels) if isinstance(result, ClassifyResult) else (result, [])
    try:
        return Outcome(result=msgspec.Raw(encode_plain(rows)), labels=labels)
    except ENCODING_ERRORS as error:
        raise BackendError(f"the result cannot be sent: {error}") from None


def outcome_of(error: FabricError, usage: Usage | None = None) -> tuple[int, Outcome]:
    """An error as a terminal: code and outcome. Whatever it carries, this much can always be sent."""
    code = error.code if isinstance(error.code, int) and 0 < error.code <= _CODE_MAX else BackendError.code
    message, details = getattr(error, "message", error), getattr(error, "details", None)
    return code, Outcome(usage=usage, message=sound_text(message), details=sound_details(details))


def sound_text(text: object) -> str:
    """Text that can be sent, and is not too long for an error: halves of characters are written as escapes."""
    try:
        known = str(text)
    except Exception:  # noqa: BLE001 — an error that cannot say what it is must not become another
        known = type(text).__name__
    if len(known) > MESSAGE_LENGTH_MAX:
        known = f"{known[: MESSAGE_LENGTH_MAX - 1]}…"
    return known.encode("utf-8", "backslashreplace").decode()


def sound_details(details: object) -> dict[str, Detail]:
    """The values of an error, as far as they can be sent."""
    if not isinstance(details, dict):
        return {}
    return {sound_text(name)[:NAME_LENGTH_MAX]: _detail(value) for name, value in list(details.items())[:DETAILS_MAX]}


def _detail(value: Any) -> Detail:
    if value is None or value.__class__ in (bool, float):
        return value
    if hasattr(value, "tolist"):
        value = plain(value)
    if isinstance(value, int) and -(2**63) <= value < _INTEGER_MAX:
        return bool(value) if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, float) else sound_text(value)
