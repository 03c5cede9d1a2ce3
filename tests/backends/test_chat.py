"""Chat templates of all kinds: what a client says arrives as its text, however template and client put it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.tiny import byte_tokenizer
from zfabric.backends.front.chat import chat_text
from zfabric.errors import RequestError, UnsupportedOperationError

#: Takes texts alone.
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
#: The same, and trims them: what is no text breaks it.
TRIMMED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].strip() }}{% endfor %}"
#: Walks over parts, as those of LLaVA and SmolVLM do; a text has none, and vanishes.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}[image]"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
#: The same through a macro and a filter.
FILTERED = (
    "{% macro show(c) %}{% for p in c | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
#: Takes both, as Qwen2-VL's.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if 'text' in part %}{{ part.text }}{% else %}[image]{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
#: A text of the system and parts of others, as Llama 3.2's.
MIXED = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)
#: Wants the user first, and turns after turns.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
TEXT = {"type": "text", "text": "Hi"}


def said(template: str, *messages: Any, **more: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return chat_text(tokenizer, list(messages), None, **more)


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, PARTS, FILTERED, BOTH, MIXED, STRICT])
def test_a_text_and_parts_of_texts_say_the_same(template: str) -> None:
    for content in ("Hi", [TEXT], ["Hi"], [{"type": "input_text", "text": "Hi"}]):
        assert said(template, {"role": "user", "content": content}) == "<user>Hi"
    if template is not STRICT:
        messages = [{"role": "system", "content": [TEXT]}, {"role": "user", "content": "Hi"}]
        assert said(template, *messages) == "<system>Hi<user>Hi"
        assert said(template, {"role": "system", "content": "Hi"}, messages[1]) == "<system>Hi<user>Hi"
    turns = [{"role": role, "content": [TEXT]} for role in ("user", "assistant", "user")]
    assert said(template, *turns) == "<user>Hi<assistant>Hi<user>Hi"


def test_several_texts_are_lines_where_there_are_no_parts() -> None:
    message = {"role": "user", "content": [TEXT, {"type": "text", "text": "there"}]}
    assert said(PLAIN, message) == "<user>Hi\nthere"
    assert said(PARTS, message) == "<user>Hithere"


def test_an_image_stands_where_the_template_has_a_place_for_it() -> None:
    message = {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "data:"}}]}
    assert said(PARTS, message, image="<image>") == "<user>Hi[image]"
    assert said(BOTH, message, image="<image>") == "<user>Hi[image]"
    # None has: it comes before the text, as vLLM has it.
    assert said(PLAIN, message, image="<image>") == "<user><image>\nHi"
    assert said(FILTERED, message, image="<image>") == "<user><image>\nHi"


def test_arguments_of_tool_calls_are_values() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "user", "content": "Hi"}
    assert said(template, asked, {"role": "assistant", "content": None, "tool_calls": [call]}) == '{"a": 1}'
    broken = {**call, "function": {"name": "add", "arguments": "{"}}
    with pytest.raises(RequestError, match="no JSON"):
        said(template, asked, {"role": "assistant", "tool_calls": [broken]})


def test_a_developer_is_the_system_of_older_templates() -> None:
    messages = [{"role": "developer", "content": "Hi"}, {"role": "user", "content": "Hi"}]
    assert said(PLAIN, *messages) == "<system>Hi<user>Hi"
    assert said(PLAIN + "{# developer #}", *messages) == "<developer>Hi<user>Hi"


def test_what_cannot_be_said_is_refused() -> None:
    for part in ({"type": "video", "video": "x"}, {"type": "text"}, 7, {"text": "Hi"}):
        with pytest.raises(RequestError, match="a part of a message is of type"):
            said(PLAIN, {"role": "user", "content": [part]})
    with pytest.raises(RequestError, match="turns"):
        said(STRICT, {"role": "assistant", "content": "Hi"})
    with pytest.raises(UnsupportedOperationError):
        chat_text(_without(), [], None)


def _without() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer
