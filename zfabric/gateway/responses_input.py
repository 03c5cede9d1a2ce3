"""What a response answers: a text, or messages, calls, their results and reasoning as items, in the form of a chat."""

from __future__ import annotations

from typing import Any, Final

from zfabric.errors import RequestError, UnsupportedParameterError
from zfabric.gateway.parts import image_part, refuse_unknown, text_part

Input = dict[str, Any]
Message = dict[str, Any]
#: What items and parts have, by type. Of these `id`, `status`, `phase`, `annotations`, `logprobs` and `detail` have no effect.
_ITEMS: Final = {
    "message": frozenset({"type", "role", "content", "id", "status", "phase"}),
    "function_call": frozenset({"type", "name", "arguments", "call_id", "id", "status"}),
    "function_call_output": frozenset({"type", "call_id", "output", "id", "status"}),
    "reasoning": frozenset({"type", "id", "summary", "content", "encrypted_content", "status"}),
}  # fmt: skip
_PARTS: Final = {
    "input_text": frozenset({"type", "text"}), "output_text": frozenset({"type", "text", "annotations", "logprobs"}),
    "text": frozenset({"type", "text"}), "refusal": frozenset({"type", "refusal"}),
    "input_image": frozenset({"type", "image_url", "detail"}),
    "reasoning_text": frozenset({"type", "text"}), "summary_text": frozenset({"type", "text"}),
}  # fmt: skip
_ROLES: Final[dict[Any, str]] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def messages_of(given: str | list[Input], instructions: str | None) -> list[Message]:
    """A chat, as templates have it. Calls and reasoning belong to the message of the assistant that they stand beside.

    Raises:
        RequestError: An item lacks something.
        UnsupportedParameterError: An item or a part of it is of a type that is not known here, or has a field that is not.
    """
    messages: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for position, item in enumerate(given):
        where = f"input[{position}]"
        kind = item.get("type", "message")
        refuse_unknown(item, _known(kind, _ITEMS, item), where)
        match kind:
            case "message":
                _add_message(messages, item, where)
            case "function_call":
                function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
                call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
                _turn(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                content = _content(item.get("output"), f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": content})
            case "reasoning":
                turn = _turn(messages)
                turn["reasoning_content"] = turn.get("reasoning_content", "") + _reasoning(item, where)
            case other:
                raise UnsupportedParameterError(
                    f"{where} is of type {other!r}, which is not known here", parameter=where
                )
    return messages


def _add_message(messages: list[Message], item: Input, where: str) -> None:
    given = item.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RequestError(f"{where}.role is {given!r}, it must be one of {', '.join(_ROLES)}", parameter=where)
    content = _content(item.get("content"), f"{where}.content")
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("role") == "assistant" and not last["content"] and "tool_calls" not in last:
        # Reasoning came before.
        last["content"] = content
        return
    messages.append({"role": role, "content": content})


def _turn(messages: list[Message]) -> Message:
    """The message of the assistant that is the last one, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _content(given: Any, where: str) -> str | list[Message]:
    """A text, or parts; one text alone stands for itself."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise RequestError(f"{where} must be a text or a list of parts", parameter=where)
    parts = [_part(part, f"{where}[{position}]") for position, part in enumerate(given)]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(part: Any, where: str) -> Message:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict):
        refuse_unknown(part, _known(kind, _PARTS, part), where)
    match kind:
        case "input_text" | "output_text" | "text":
            return text_part(_text(part, "text", where))
        case "refusal":
            return text_part(_text(part, "refusal", where))
        case "input_image":
            return image_part(_text(part, "image_url", where))
    raise UnsupportedParameterError(f"{where} is of type {kind!r}, which is not known here", parameter=where)


def _reasoning(item: Input, where: str) -> str:
    # A summary says the same once more.
    told = item.get("content") or item.get("summary") or ()
    if not told and item.get("encrypted_content"):
        raise UnsupportedParameterError(f"{where}.encrypted_content cannot be read here", parameter=where)
    if not isinstance(told, list | tuple) or not all(isinstance(part, dict) for part in told):
        raise RequestError(f"{where} must have a list of parts", parameter=where)
    for part in told:
        refuse_unknown(part, _known(part.get("type"), _PARTS, part), where)
    return "".join(_text(part, "text", where) for part in told)


def _known(kind: Any, table: dict[str, frozenset[str]], item: dict[str, Any]) -> frozenset[str]:
    """The fields of a type; those that an item has where its type is to be refused itself."""
    return table.get(kind if isinstance(kind, str) else "", frozenset(item))


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a text", parameter=f"{where}.{name}")
    return value
