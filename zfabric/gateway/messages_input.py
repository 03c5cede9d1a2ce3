"""Anthropic's messages, made of blocks, in the form of a chat."""

from __future__ import annotations

from typing import Any, Final

from zfabric.errors import RequestError, UnsupportedParameterError
from zfabric.gateway.parts import image_part, refuse_unknown, text_part
from zfabric.gateway.sse import encode

Message = dict[str, Any]

_MESSAGE: Final = frozenset({"role", "content"})
#: What blocks have, by type. Of these, `cache_control`, `citations`, `is_error`, `signature` and `caller` have no effect.
_BLOCKS: Final = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "image": frozenset({"type", "source", "cache_control"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
}  # fmt: skip
_SOURCES: Final = {
    "base64": frozenset({"type", "media_type", "data"}), "url": frozenset({"type", "url"}),
}  # fmt: skip


def chat_of(given: list[Message], system: str | list[Message] | None) -> list[Message]:
    """A chat, as templates have it: results of tools are messages of their own.

    Raises:
        RequestError: A message or a block lacks something.
        UnsupportedParameterError: A block is of a type that is not known here, or has a field that is not.
    """
    chat: list[Message] = []
    if system:
        chat.append({"role": "system", "content": _content(system, "system")})
    for position, message in enumerate(given):
        where = f"messages[{position}]"
        refuse_unknown(message, _MESSAGE, where)
        content = message.get("content")
        match message.get("role"):
            case "user":
                chat += _of_user(content, f"{where}.content")
            case "assistant":
                chat.append(_of_assistant(content, f"{where}.content"))
            case "system":
                chat.append({"role": "system", "content": _content(content, f"{where}.content")})
            case other:
                raise RequestError(f"{where}.role is {other!r}, it must be user, assistant or system", parameter=where)
    return chat


def _of_user(content: Any, where: str) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Message] = []
    rest: list[Message] = []
    for place, block in _blocks(content, where):
        if block.get("type") != "tool_result":
            rest.append(_part(block, place))
            continue
        result = _content(block.get("content") or "", f"{place}.content")
        results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": result})
    return [*results, {"role": "user", "content": _joined(rest)}] if rest else results


def _of_assistant(content: Any, where: str) -> Message:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    parts: list[Message] = []
    thinking: list[str] = []
    calls: list[Message] = []
    for place, block in _blocks(content, where):
        match block.get("type"):
            case "thinking":
                thinking.append(_text(block, "thinking", place))
            case "tool_use":
                arguments = encode(block.get("input") or {}).decode()
                function = {"name": _text(block, "name", place), "arguments": arguments}
                calls.append({"id": _text(block, "id", place), "type": "function", "function": function})
            case _:
                parts.append(_part(block, place))
    message: Message = {"role": "assistant", "content": _joined(parts) if parts else None}
    if thinking:
        message["reasoning_content"] = "".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _content(content: Any, where: str) -> str | list[Message]:
    if isinstance(content, str):
        return content
    return _joined([_part(block, place) for place, block in _blocks(content, where)])


def _joined(parts: list[Message]) -> str | list[Message]:
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _blocks(content: Any, where: str) -> list[tuple[str, Message]]:
    """Each block and where it stands. Raises: RequestError, UnsupportedParameterError for a field that is none."""
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise RequestError(f"{where} must be a text or a list of blocks", parameter=where)
    placed = [(f"{where}[{position}]", block) for position, block in enumerate(content)]
    for place, block in placed:
        known = _BLOCKS.get(_type(block))
        if known is not None:
            refuse_unknown(block, known, place)
    return placed


def _type(item: Message) -> str:
    """What an item says that it is; "" for nothing that could be a type."""
    kind = item.get("type")
    return kind if isinstance(kind, str) else ""


def _part(block: Message, where: str) -> Message:
    kind = block.get("type")
    if kind == "text":
        return text_part(_text(block, "text", where))
    if kind == "image":
        source = block.get("source")
        if not isinstance(source, dict):
            raise RequestError(f"{where}.source must be an object", parameter=f"{where}.source")
        refuse_unknown(source, _SOURCES.get(_type(source), frozenset(source)), f"{where}.source")
        if source.get("type") == "base64":
            return image_part(f"data:{_text(source, 'media_type', where)};base64,{_text(source, 'data', where)}")
        if source.get("type") == "url":
            return image_part(_text(source, "url", where))
    raise UnsupportedParameterError(f"{where} is of type {kind!r}, which is not known here", parameter=where)


def _text(block: Message, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a text", parameter=f"{where}.{name}")
    return value
