"""From chat messages to a prompt, by a template of transformers.

Some templates take a message's content as a text, some walk over its parts, some do both, and one may do otherwise for the
system's message than for the user's. A text that is given to the second kind, or parts to the first, vanish or appear as
Python writes them. What a template takes is therefore tried out, once for each role, and content is given to it so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.chat import PLAIN, ChatOptions, Message
from zfabric.wire.parts import IMAGES

#: Kinds of parts that are text, and the key that holds it.
_TEXTS: Final = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking",
}  # fmt: skip
#: Texts that no template holds.
_MARKS: Final = ("zQ4first7x", "zQ4second7x")
_Render = Callable[..., str]


class _Taken:
    """What a template takes as the content of one role."""

    __slots__ = ("parts", "text")

    def __init__(self, *, text: bool, parts: bool) -> None:
        self.text = text
        self.parts = parts

    def given(self, content: str) -> Any:
        """A text as the template takes it."""
        return [{"type": "text", "text": content}] if self.parts and not self.text else content


#: Of a template, by role. Templates come from files and options, so there are few; roles may be whatever a client writes.
_known: dict[tuple[str, str], _Taken] = {}
_KNOWN_MAX: Final = 256


def chat_text(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    chat: ChatOptions | None = None,
    image: str | None = None,
) -> str:
    """What the chat template makes of messages.

    Args:
        chat: What it is told besides.
        image: What stands for an image in a text, for templates that take no parts; None where there are no images.

    Raises:
        UnsupportedOperationError: There is no template.
        RequestError: It refuses the messages, or a part is of a kind that is not known.
    """
    if tokenizer.chat_template is None:
        raise no_template()

    template = template_of(tokenizer, tools, chat)
    render = _renderer(tokenizer, template, tools)
    conversation = [_message(message, template, render, image) for message in messages]
    try:
        return render(conversation, **(chat or PLAIN).arguments)
    except Exception as error:  # noqa: BLE001 — templates are programs and raise what they like
        raise RequestError(f"the chat template refuses these messages: {error}") from None


def text_parts(
    tokenizer: Any, template: str, tools: list[dict[str, Any]] | None, message: Message
) -> list[dict[str, Any]] | None:
    """The content of a message as parts, where that is what `chat_text` gives to a template; None where it is a text, or no text.

    Raises:
        RequestError: A part is of a kind that is not known.
    """
    content = message.get("content")
    parts = parts_of(message)
    if not isinstance(content, str | list) or any(map(is_image, parts)):
        return None
    taken = _taken(template, str(message.get("role", "")), _renderer(tokenizer, template, tools))
    if not taken.parts or (taken.text and isinstance(content, str)):
        return None
    return [_part(part) for part in parts or [content]]


def template_name(templates: Any, tools: list[dict[str, Any]] | None, chat: ChatOptions | None) -> str | None:
    """Which of a tokenizer's several templates is for such a request; None where it has one, or for its usual choice.

    That is "rag" where there are documents; transformers itself takes "tool_use" where there are tools, else "default".
    """
    documents = chat is not None and chat.documents is not None
    return "rag" if documents and not tools and isinstance(templates, dict) and "rag" in templates else None


def template_of(tokenizer: Any, tools: list[dict[str, Any]] | None, chat: ChatOptions | None) -> str:
    """The text of the template that a request's messages go through: see `template_name`.

    Raises:
        UnsupportedOperationError: The tokenizer has several templates, and none that is for such a request.
    """
    name = template_name(tokenizer.chat_template, tools, chat)
    try:
        return str(tokenizer.get_chat_template(name, tools=tools or None))
    except ValueError:
        there = ", ".join(sorted(tokenizer.chat_template))
        raise UnsupportedOperationError(
            f"this model's tokenizer has the chat templates {there}, and no default one for a request without tools: "
            f"start the worker with --chat-template",
            operation="chat",
        ) from None


def no_template() -> UnsupportedOperationError:
    """The error of messages to a model that has no chat template."""
    return UnsupportedOperationError(
        "this model's tokenizer has no chat template; send a prompt, or start the worker with --chat-template"
    )


def parts_of(message: Message) -> list[Any]:
    """The parts of a message; none if its content is a text."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def is_image(part: Any) -> bool:
    """Whether a part of a message is an image."""
    return isinstance(part, dict) and part.get("type") in IMAGES


def _renderer(tokenizer: Any, template: str, tools: list[dict[str, Any]] | None) -> _Render:
    """What makes a text of a conversation, and of what the template is told besides."""

    def render(conversation: list[Message], **told: Any) -> str:
        arguments = {"add_generation_prompt": True, **told}
        return str(
            tokenizer.apply_chat_template(
                conversation, chat_template=template, tools=tools or None, tokenize=False, **arguments
            )
        )

    return render


def _message(message: Message, template: str, render: _Render, image: str | None) -> Message:
    """A message as the template takes it."""
    role = str(message.get("role", ""))
    if role == "developer" and "developer" not in template:
        # A newer name of the same, which templates that were written before do not know.
        role, message = "system", {**message, "role": "system"}
    if message.get("tool_calls"):
        message = {**message, "tool_calls": [_call(call) for call in message["tool_calls"]]}
    content = message.get("content")
    if not isinstance(content, str | list):
        return message
    taken = _taken(template, role, render)
    if isinstance(content, str):
        return {**message, "content": taken.given(content)}
    parts = [_part(part) for part in content]
    if taken.parts and (image is None or _shows_images(template, role, render)):
        return {**message, "content": parts}
    images = [image or "" for part in parts if part["type"] == "image"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return {**message, "content": taken.given("\n".join([*images, *texts]))}


def _part(part: Any) -> dict[str, Any]:
    """A part as templates know it: a text, or the mere mark of an image."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if is_image(part):
        return {"type": "image"}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get(_TEXTS.get(str(kind), "")) if isinstance(part, dict) else None
    if not isinstance(text, str):
        known = ", ".join(sorted({*_TEXTS, *IMAGES}))
        raise RequestError(f"a part of a message is of type {kind!r} or without its text, there are {known}")
    return {"type": "text", "text": text}


def _call(call: Any) -> Any:
    """A call of a tool, with arguments as templates take them: as values, where OpenAI's API has their JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError as error:
        raise RequestError(f"the arguments of a tool call are no JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}


# ── what a template takes ───────────────────────────────────────────────────────────────────────────────────────────


def _taken(template: str, role: str, render: _Render) -> _Taken:
    key = (template, role)
    found = _known.get(key)
    if found is None:
        text = _shown(role, render, _MARKS[0], 1)
        parts = _shown(role, render, [{"type": "text", "text": mark} for mark in _MARKS], len(_MARKS))
        found = _Taken(text=text, parts=parts)
        if not (text or parts) and role != "user":
            # Not every template has a place for every role, or for this one alone.
            found = _taken(template, "user", render)
        _remember(key, found)
    return found


def _remember(key: tuple[str, str], found: _Taken) -> None:
    if len(_known) >= _KNOWN_MAX:
        _known.clear()
    _known[key] = found


def _shown(role: str, render: _Render, content: Any, count: int) -> bool:
    """Whether content of a role comes out as its text, and each of its marks once."""
    for conversation in _conversations(role, content):
        try:
            text = render(conversation)
        except Exception:  # noqa: BLE001 — another conversation may be to its taste
            continue
        return all(text.count(mark) == 1 and not _quoted(text, mark) for mark in _MARKS[:count])
    return False


def _quoted(text: str, mark: str) -> bool:
    """Whether a mark stands in what Python or JSON make of a part."""
    before = text[max(0, text.index(mark) - 12) : text.index(mark)]
    return before.endswith(("'", '"')) and "text" in before


def _shows_images(template: str, role: str, render: _Render) -> bool:
    """Whether a part that is an image leaves a trace."""
    key = (template, f"{role} with images")
    if key not in _known:
        text = [{"type": "text", "text": _MARKS[0]}]
        shown = False
        for plain, seen in zip(
            _conversations(role, text), _conversations(role, [{"type": "image"}, *text]), strict=True
        ):
            try:
                shown = shown or render(plain) != render(seen)
            except Exception:  # noqa: BLE001 — as above
                continue
        _remember(key, _Taken(text=False, parts=shown))
    return _known[key].parts


def _conversations(role: str, content: Any) -> list[list[Message]]:
    """Conversations that have such content at the place of a role. What others say is given in the same form."""

    def said(by: str) -> Message:
        return {"role": by, "content": [{"type": "text", "text": "a"}] if isinstance(content, list) else "a"}

    tried: Message = {"role": role, "content": content}
    if role == "user":
        return [[tried], [said("system"), tried]]
    if role == "assistant":
        return [[said("user"), tried, said("user")], [said("user"), tried]]
    if role == "system":
        return [[tried, said("user")], [{**tried}, {"role": "user", "content": "a"}]]
    calls = [{"id": "a", "type": "function", "function": {"name": "a", "arguments": {}}}]
    called: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    return [[said("user"), called, {**tried, "tool_call_id": "a", "name": "a"}], [said("user"), tried]]
