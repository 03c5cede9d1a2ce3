"""From a caller's arguments to a request, and from a result to arrays.

Everything is checked here, before a request is accepted: of what type it is, and that it can be sent. Ranges are the
request's own to check. So nobody but the caller ever hears of a wrong argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast, get_args

from msgspec import structs

from zfabric.client import values
from zfabric.client.options import SubmitOptions
from zfabric.core.client.pending import Resume
from zfabric.errors import ProtocolError, RequestError, UnsupportedParameterError
from zfabric.limits import (
    AFFINITY_LENGTH_MAX,
    CALL_TIMEOUT_MS,
    DEADLINE_MAX_MS,
    NAME_LENGTH_MAX,
    PREFIX_BLOCK_TOKENS,
    PRIORITY_MAX,
    QUERY_TIMEOUT_MS,
)
from zfabric.wire.chat import ChatOptions, Message
from zfabric.wire.payloads import CountRequest, OperateRequest, TextRequest
from zfabric.wire.prefixes import prefix_hashes
from zfabric.wire.sampling import TOKENS_MAX, WHAT_THE_CONTEXT_LEAVES, SamplingOptions
from zfabric.wire.tasks import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: How each sampling parameter is taken; their declarations say it.
_SAMPLING: Final = {field.name: values.take_for(field.type) for field in structs.fields(SamplingOptions)}
_EMBED: Final = {
    field.name: values.take_for(field.type)
    for field in structs.fields(EmbedRequest)
    if field.name in ("dimensions", "normalize", "truncate", "pooling", "prompt_name")
}
_EMBED_TOKENS: Final = {
    field.name: values.take_for(field.type)
    for field in structs.fields(EmbedTokensRequest)
    if field.name in ("dimensions", "normalize", "truncate", "prompt_name")
}
_resume: Final = values.one_of(get_args(Resume))


def generate_request(prompt: object, options: Mapping[str, Any]) -> tuple[TextRequest, SubmitOptions]:
    """A request for text, and how to submit it.

    Raises:
        UnsupportedParameterError: A name that is no parameter.
        ParameterRangeError, RequestError: A value that is out of range, of the wrong type, or cannot be sent.
    """
    given = dict(options)
    submit = _submit_options(given)
    submit["resume"] = values.taken(_resume, "resume", given.pop("resume")) if "resume" in given else "exact"
    parts = {
        name: values.taken(take, name, value)
        for name, take in _PARTS.items()
        if (value := given.pop(name, None)) is not None
    }
    hinted = values.taken(values.flag, "prefix_hints", given.pop("prefix_hints", False))
    chat = _chat_options(given)
    _take_length(given)
    sampling = SamplingOptions(**_known(given, _SAMPLING, "a request"))
    request = TextRequest(prompt=_taken(values.text, "prompt", prompt), sampling=sampling, chat=chat, **parts)
    request.validate()
    if hinted:
        submit["prefix"] = prefix_hashes(request)
        submit["prefix_block"] = PREFIX_BLOCK_TOKENS if submit["prefix"] else 0
    return request, submit


def embed_request(inputs: object, options: Mapping[str, Any]) -> tuple[EmbedRequest, SubmitOptions]:
    """A request for vectors, and how to submit it. Raises: as `generate_request`."""
    given = dict(options)
    submit = _submit_options(given)
    known = _known(given, _EMBED, "embed")
    request = EmbedRequest(inputs=values.taken(_inputs, "inputs", inputs), **known)
    request.validate()
    return request, submit


def embed_tokens_request(inputs: object, options: Mapping[str, Any]) -> tuple[EmbedTokensRequest, SubmitOptions]:
    """A request for vectors of tokens, and how to submit it. Raises: as `generate_request`."""
    given = dict(options)
    submit = _submit_options(given)
    known = _known(given, _EMBED_TOKENS, "embed_tokens")
    request = EmbedTokensRequest(inputs=values.taken(_inputs, "inputs", inputs), **known)
    request.validate()
    return request, submit


def count_request(
    prompt: object, messages: object, timeout: object, options: Mapping[str, Any] | None = None
) -> tuple[CountRequest, SubmitOptions]:
    """A request for tokens of a prompt, and how to submit it. Raises: as `generate_request`."""
    given = dict(options or {})
    tools, chat = given.pop("tools", None), _chat_options(given)
    _known(given, {}, "a prompt to count")
    request = CountRequest(
        prompt=_taken(values.text, "prompt", prompt),
        messages=_taken(_messages, "messages", messages),
        tools=_taken(_maps, "tools", tools),
        chat=chat,
    )
    request.validate()
    return request, SubmitOptions(deadline_ms=call_timeout_ms(timeout), priority=0)


def detokenize_request(
    token_ids: object, skip_special_tokens: object, timeout: object
) -> tuple[DetokenizeRequest, SubmitOptions]:
    """A request for the text of tokens, and how to submit it. Raises: as `generate_request`."""
    request = DetokenizeRequest(
        token_ids=values.taken(values.tokens, "token_ids", token_ids),
        skip_special_tokens=values.taken(values.flag, "skip_special_tokens", skip_special_tokens),
    )
    request.validate()
    return request, SubmitOptions(deadline_ms=call_timeout_ms(timeout), priority=0)


def score_request(query: object, documents: object, options: Mapping[str, Any]) -> tuple[ScoreRequest, SubmitOptions]:
    """A request for scores, and how to submit it. Raises: as `generate_request`."""
    given = dict(options)
    submit = _submit_options(given)
    _known(given, {}, "score")
    texts = list(values.taken(values.texts, "documents", documents))
    request = ScoreRequest(query=values.taken(values.text, "query", query), documents=texts)
    request.validate()
    return request, submit


def classify_request(inputs: object, options: Mapping[str, Any]) -> tuple[ClassifyRequest, SubmitOptions]:
    """A request for classes, and how to submit it. Raises: as `generate_request`."""
    given = dict(options)
    submit = _submit_options(given)
    _known(given, {}, "classify")
    request = ClassifyRequest(inputs=values.taken(_texts_or_pairs, "inputs", inputs))
    request.validate()
    return request, submit


def reward_request(inputs: object, options: Mapping[str, Any]) -> tuple[RewardRequest, SubmitOptions]:
    """A request for rewards, and how to submit it. Raises: as `generate_request`."""
    given = dict(options)
    submit = _submit_options(given)
    _known(given, {}, "reward")
    request = RewardRequest(inputs=values.taken(_texts_or_chats, "inputs", inputs))
    request.validate()
    return request, submit


def operate_request(
    call: object, arguments: Mapping[str, object], timeout: object
) -> tuple[OperateRequest, SubmitOptions]:
    """An operator's call, and how to submit it. Raises: as `generate_request`."""
    taken = {values.taken(values.text, "arguments", name): _argument(name, value) for name, value in arguments.items()}
    request = OperateRequest(call=values.taken(values.text, "call", call), arguments=taken)
    request.validate()
    return request, SubmitOptions(deadline_ms=call_timeout_ms(timeout), priority=0)


def model_name(model: object, parameter: str = "model", *, empty: bool = False) -> str:
    """The name of a model, or of something else that has one. Raises: RequestError, ParameterRangeError."""
    name: str = values.taken(values.text, parameter, model)
    if not int(not empty) <= len(name) <= NAME_LENGTH_MAX:
        raise values.out_of_range(f"length of {parameter}", len(name), f"{int(not empty)} … {NAME_LENGTH_MAX}")
    return name


def query_timeout_ms(timeout: object) -> int:
    """How long a query may take, from seconds or None. Raises: RequestError, ParameterRangeError."""
    return QUERY_TIMEOUT_MS if timeout is None else _timeout_ms(timeout)


def call_timeout_ms(timeout: object) -> int:
    """How long a call may take that makes no text, from seconds or None. Raises: RequestError, ParameterRangeError."""
    return CALL_TIMEOUT_MS if timeout is None else _timeout_ms(timeout)


def vectors(result: EmbedResult, count: int) -> NDArray[np.float32]:
    """The array in a result, without a copy. Raises: ProtocolError if sizes do not fit."""
    if result.rows != count:
        raise ProtocolError(f"{result.rows} vectors came for {count} inputs", rows=result.rows, inputs=count)
    return _matrix(result.data, result.rows, result.dimensions)


def token_vectors(result: EmbedTokensResult, count: int) -> list[NDArray[np.float32]]:
    """The arrays in a result, one for each input, without a copy. Raises: ProtocolError if sizes do not fit."""
    if len(result.tokens) != count or any(tokens < 0 for tokens in result.tokens):
        raise ProtocolError(f"vectors of {len(result.tokens)} texts came for {count} inputs", inputs=count)
    whole = _matrix(result.data, sum(result.tokens), result.dimensions)
    ends = list(itertools.accumulate(result.tokens))
    return [whole[end - tokens : end] for tokens, end in zip(result.tokens, ends, strict=True)]


def _matrix(data: bytes, rows: int, dimensions: int) -> NDArray[np.float32]:
    import numpy as np

    if dimensions < 0 or len(data) != 4 * rows * dimensions:
        raise ProtocolError(f"{len(data)} bytes are not {rows} × {dimensions} float32 values")
    return np.frombuffer(data, dtype="<f4").reshape(rows, dimensions)


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _taken(take: values.Take, name: str, value: object) -> Any:
    return None if value is None else values.taken(take, name, value)


def _known(given: Mapping[str, Any], takes: Mapping[str, values.Take], what: str) -> dict[str, Any]:
    """The given values by name. Raises: UnsupportedParameterError for a name that is none of these."""
    for name in given:
        if name not in takes:
            raise UnsupportedParameterError(f"{name!r} is not a parameter of {what}", parameter=name)
    return {name: values.taken(takes[name], name, value) for name, value in given.items()}


def _submit_options(given: dict[str, Any]) -> SubmitOptions:
    """Takes what the envelope needs out of a caller's options."""
    deadline_ms, timeout = given.pop("deadline_ms", None), given.pop("timeout", None)
    if deadline_ms is not None and timeout is not None:
        raise RequestError("timeout and deadline_ms are both given, give one of them", parameter="timeout")
    if timeout is not None:
        deadline_ms = _timeout_ms(timeout)
    elif deadline_ms is not None:
        deadline_ms = values.taken(values.whole, "deadline_ms", deadline_ms)
        if not 0 <= deadline_ms <= DEADLINE_MAX_MS:
            raise values.out_of_range("deadline_ms", deadline_ms, f"0 … {DEADLINE_MAX_MS}")
    priority = values.taken(values.whole, "priority", given.pop("priority")) if "priority" in given else 0
    if not -PRIORITY_MAX <= priority <= PRIORITY_MAX:
        raise values.out_of_range("priority", priority, f"{-PRIORITY_MAX} … {PRIORITY_MAX}")
    submit = SubmitOptions(deadline_ms=deadline_ms, priority=priority)
    affinity = given.pop("affinity", None)
    if affinity is not None:
        submit["affinity"] = affinity_key(affinity)
    return submit


def affinity_key(value: object) -> str:
    """A key of affinity. Raises: RequestError, ParameterRangeError."""
    key: str = values.taken(values.text, "affinity", value)
    if len(key) > AFFINITY_LENGTH_MAX:
        raise values.out_of_range("length of affinity", len(key), f"0 … {AFFINITY_LENGTH_MAX}")
    return key


def _timeout_ms(timeout: object) -> int:
    seconds: float = values.taken(values.number, "timeout", timeout)
    if not 0 <= seconds <= DEADLINE_MAX_MS / 1_000:
        raise values.out_of_range("timeout", seconds, f"0 … {DEADLINE_MAX_MS // 1_000} s")
    return math.ceil(seconds * 1_000)


def _take_length(given: dict[str, Any]) -> None:
    """The bound of an answer, by either of its names. None is a value of its own there: what the context leaves.

    Raises:
        RequestError: It is given by both names, and they differ.
        ParameterRangeError: It is no number of tokens.
    """
    names = [name for name in ("max_tokens", "max_new_tokens") if name in given]
    limits = [values.taken(_SAMPLING["max_new_tokens"], name, given.pop(name)) for name in names]
    if not names:
        return
    if limits[0] != limits[-1]:
        raise RequestError(
            f"max_tokens is {limits[0]} and max_new_tokens is {limits[1]}, give one", parameter="max_tokens"
        )
    if limits[0] is not None and not 1 <= limits[0] <= TOKENS_MAX:
        raise values.out_of_range(names[0], limits[0], f"1 … {TOKENS_MAX}")
    given["max_new_tokens"] = WHAT_THE_CONTEXT_LEAVES if limits[0] is None else limits[0]


def _messages(name: str, value: object) -> list[Message]:
    """Chat messages: maps with a role."""
    messages = _maps(name, value, binary=True)
    for at, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise RequestError(f"{name}[{at}] has no role", parameter=name)
    return messages


def _chat_options(given: dict[str, Any]) -> ChatOptions | None:
    """What a chat template is to be told, taken out of what was given."""
    if given.keys().isdisjoint(_CHAT):
        return None
    found = {name: take(name, value) for name, take in _CHAT.items() if (value := given.pop(name, None)) is not None}
    return ChatOptions(**found) if found else None


def _maps(name: str, value: object, *, binary: bool = False) -> list[dict[str, Any]]:
    items = values.sequence(name, value, "a list of maps")
    return [_map(f"{name}[{at}]", item, binary=binary) for at, item in enumerate(items)]


def _map(name: str, value: object, *, binary: bool = False) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise values.wrong(name, value, "a map")
    return cast("dict[str, Any]", values.structure(name, value, binary=binary))


def _text_or_map(name: str, value: object) -> str | dict[str, Any]:
    return values.text(name, value) if isinstance(value, str) else _map(name, value)


#: What a request for text has besides its prompt and its parameters.
_PARTS: Final[dict[str, values.Take]] = {
    "messages": _messages,
    "prompt_token_ids": values.tokens,
    "tools": _maps,
    "response_format": _map,
    "extra": _map,
}


def _argument(name: str, value: object) -> Any:
    return values.taken(lambda path, given: values.structure(path, given, binary=True), f"arguments.{name}", value)


def _inputs(name: str, value: object) -> list[str | list[int]]:
    """Texts and rows of token ids; one text is a list of one."""
    if isinstance(value, str):
        return [values.text(name, value)]
    rows: Iterable[object] = values.sequence(name, value, "a text, or a list of texts and lists of token ids")
    return [_input(f"{name}[{at}]", row) for at, row in enumerate(rows)]


def _input(name: str, value: object) -> str | list[int]:
    if isinstance(value, str):
        return values.text(name, value)
    return values.tokens(name, value)


def _texts_or_pairs(name: str, value: object) -> list[str | list[str]]:
    """Texts and pairs of texts; one text is a list of one."""
    return _mixed(
        name, value, lambda path, item: list(values.texts(path, item)), "a text, or a list of texts and pairs"
    )


def _texts_or_chats(name: str, value: object) -> list[str | list[Message]]:
    """Texts and lists of messages; one text is a list of one."""
    return _mixed(name, value, _messages, "a text, or a list of texts and lists of messages")


def _mixed(name: str, value: object, take: Callable[[str, Any], list[Any]], expected: str) -> list[Any]:
    if isinstance(value, str):
        return [values.text(name, value)]
    items = enumerate(values.sequence(name, value, expected))
    paths = [(f"{name}[{at}]", item) for at, item in items]
    return [values.text(path, item) if isinstance(item, str) else take(path, item) for path, item in paths]


#: How each option of a chat is taken.
_CHAT: Final[dict[str, Callable[[str, Any], Any]]] = {
    "chat_template_kwargs": lambda name, value: values.taken(_map, name, value),
    "add_generation_prompt": lambda name, value: values.taken(values.flag, name, value),
    "continue_final_message": lambda name, value: values.taken(values.flag, name, value),
    "documents": lambda name, value: values.taken(_maps, name, value),
    "tool_choice": lambda name, value: values.taken(_text_or_map, name, value),
    "parallel_tool_calls": lambda name, value: values.taken(values.flag, name, value),
}
