"""Chat templates of all kinds: what a client says arrives as its text, however template and client put it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zfabric.testing
from tests.backends.tiny import byte_tokenizer
from zfabric.backends.echo import EchoWorker
from zfabric.backends.front import chat
from zfabric.backends.front.chat import chat_text
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import RequestError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.chat import ChatOptions

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


# ── what a template is told besides ─────────────────────────────────────────────────────────────────────────────────

#: As models that think have it: a switch, and an empty thought where it is off.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
SEVERAL = {
    "default": "default{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "tool_use": "tools {{ tools | map(attribute='function.name') | join(',') }}{% for m in messages %}<{{ m.role }}>{% endfor %}",
    "rag": "documents {{ documents | map(attribute='text') | join(',') }}{% for m in messages %}<{{ m.role }}>{% endfor %}",
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "Hi"}


def test_a_template_is_told_what_the_caller_says() -> None:
    assert said(THINKING, USER) == "<user>Hi</><assistant>"
    quiet = ChatOptions(chat_template_kwargs={"enable_thinking": False})
    assert said(THINKING, USER, chat=quiet) == "<user>Hi</><assistant><think></think>"
    assert said(THINKING, USER, chat=ChatOptions(add_generation_prompt=False)) == "<user>Hi</>"


def test_the_last_message_is_gone_on_with() -> None:
    begun = {"role": "assistant", "content": "The answer"}
    assert (
        said(THINKING, USER, begun, chat=ChatOptions(continue_final_message=True)) == "<user>Hi</><assistant>The answer"
    )


def test_of_several_templates_the_one_for_the_request_is_taken() -> None:
    def text(tools: Any = None, **chat: Any) -> str:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = SEVERAL
        return chat_text(tokenizer, [USER], tools, chat=ChatOptions(**chat) if chat else None)

    assert text() == "default<user>Hi"
    assert text([TOOL]) == "tools look<user>"
    assert text(documents=[{"text": "one"}, {"text": "two"}]) == "documents one,two<user>"
    assert text([TOOL], documents=[{"text": "one"}]) == "tools look<user>"


def test_roles_that_clients_invent_fill_nothing() -> None:
    for number in range(2 * chat._KNOWN_MAX):
        said(PLAIN, {"role": f"role-{number}", "content": "Hi"})
    assert len(chat._known) <= chat._KNOWN_MAX


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "set one of them"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        ChatOptions(**options).validate()


async def test_counting_sees_what_generating_sees(tiny_llama: Path) -> None:
    options = TransformersOptions(model=str(tiny_llama), model_names=("m",), dtype="float32", device="cpu", threads=1)
    worker = ModelWorker(options)
    template = THINKING.replace("{% for", "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for", 1)
    async with zfabric.testing.serving(worker) as client:
        assert worker._assembled is not None
        worker._assembled.loaded.tokenizer.chat_template = template
        asked: list[dict[str, Any]] = [
            {},
            {"tools": [TOOL]},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"add_generation_prompt": False},
        ]
        counts = []
        for given in asked:
            answer = await client.chat("m", [USER], max_new_tokens=1, temperature=0, **given)
            counts.append(await client.count_tokens("m", messages=[USER], **given))
            assert counts[-1] == answer.usage.prompt_tokens == len(await client.tokenize("m", messages=[USER], **given))
        assert len(set(counts)) == len(asked)
        with pytest.raises(RequestError, match="goes with messages"):
            await client.generate("m", "text", add_generation_prompt=False)


async def test_who_has_no_template_says_so_by_name() -> None:
    async with zfabric.testing.serving(EchoWorker()) as client:
        asked: list[dict[str, Any]] = [
            {"chat_template_kwargs": {"a": 1}},
            {"documents": []},
            {"continue_final_message": True},
        ]
        for given in asked:
            (name,) = given
            with pytest.raises(UnsupportedParameterError, match=name):
                await client.chat("echo", [USER], **given)
            with pytest.raises(UnsupportedParameterError, match=name):
                await client.count_tokens("echo", messages=[USER], **given)
