"""From texts, messages and tokens to an engine's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

from zfabric.backends.front.chat import text_parts
from zfabric.wire.parts import has_media


def tokens_input(token_ids: list[int]) -> Any:
    """An engine's input that needs no more preparation."""
    from vllm.inputs import tokens_input as make

    return make(token_ids)


def salted(given: Any, salt: str | None) -> Any:
    """An engine's input whose cached prefix is found by inputs of the same salt alone."""
    return given if salt is None else {**given, "cache_salt": salt}


async def render_text(engine: Any, text: str, *, inline: bool) -> list[int]:
    """Token ids of a text, special tokens included.

    Args:
        inline: Do it here and now, which for short texts takes less than a change of threads.
    """
    parameters = _unbounded(engine.renderer.default_cmpl_tok_params)
    prompts = [{"prompt": text}]
    if inline:
        (rendered,) = engine.renderer.render_cmpl(prompts, parameters)
    else:
        (rendered,) = await engine.renderer.render_cmpl_async(prompts, parameters)
    return list(rendered["prompt_token_ids"])


async def render_chat(
    engine: Any, messages: list[dict[str, Any]], template: str | None, arguments: Mapping[str, Any]
) -> Any:
    """An engine's input of chat messages, images and all."""
    from vllm.renderers import ChatParams

    form: Any = "auto"
    if template is not None:
        messages, template, form = _as_template_takes(engine, messages, template, arguments.get("tools"))
    chat = ChatParams(chat_template=template, chat_template_kwargs=dict(arguments), chat_template_content_format=form)
    parameters = _unbounded(engine.renderer.default_chat_tok_params)
    _, (rendered,) = await engine.renderer.render_chat_async([messages], chat, parameters)
    return rendered


def _as_template_takes(
    engine: Any, messages: list[dict[str, Any]], template: str, tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], str, str]:
    """Messages, template, and the form of content, such that each text comes to the template as `chat_text` gives it.

    vLLM gives all messages in one form, and makes one text of the parts of a tool's result in either. A template that walks over
    parts would see none of those, and one that takes texts and parts may make another prompt of a text in parts. So parts go as a
    text with marks between them, and the template begins with what takes it apart again. With images, only results do.
    """
    tokenizer = engine.renderer.get_tokenizer()
    if not hasattr(tokenizer, "apply_chat_template"):
        return messages, template, "auto"
    plain = not any(map(has_media, messages))
    found = list(messages)
    for at, message in enumerate(messages):
        parts = text_parts(tokenizer, template, tools, message) if plain or message.get("role") == "tool" else None
        if parts is not None:
            found[at] = {**message, "content": "".join([_MARK + part["text"] for part in parts])}
    if all(one is other for one, other in zip(found, messages, strict=True)):
        return messages, template, "string" if plain else "auto"
    from vllm.renderers.hf import resolve_chat_template_content_format

    settings = engine.vllm_config.model_config
    form = resolve_chat_template_content_format(template, tools, "auto", tokenizer, model_config=settings)
    return found, _APART + template, "string" if plain else str(form)


#: Stands before each part of a text; no text holds it.
_MARK: Final = "\x1ezQ4part\x1e"
#: Ends with a line's end, which belongs to the block, so that the template itself begins at the beginning of a line.
_APART: Final = (
    "{%- set zfabric = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- if m.content is string and m.content.startswith('" + _MARK + "') -%}"
    "{%- set apart = namespace(parts=[]) -%}"
    "{%- for text in m.content.split('" + _MARK + "')[1:] -%}"
    "{%- set apart.parts = apart.parts + [{'type': 'text', 'text': text}] -%}"
    "{%- endfor -%}"
    "{%- set zfabric.messages = zfabric.messages + [dict(m, content=apart.parts)] -%}"
    "{%- else -%}"
    "{%- set zfabric.messages = zfabric.messages + [m] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = zfabric.messages %}\n"
)


def chat_template(engine: Any, template: str | None) -> str | None:
    """The template that messages go through, None if there is none."""
    from vllm.renderers.hf import resolve_chat_template

    try:
        found = resolve_chat_template(
            engine.renderer.get_tokenizer(), template, None, model_config=engine.vllm_config.model_config
        )
    except Exception:  # noqa: BLE001 — tokenizers that are not of transformers bring templates of their own, or none
        return template
    return str(found) if found else None


def _unbounded(parameters: Any) -> Any:
    """Lengths are checked, and prompts cut, by the worker: its errors name both lengths."""
    return dataclasses.replace(parameters, max_total_tokens=None)


def end_tokens(engine: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation settings and the tokenizer."""
    found: set[int] = set()
    settings = engine.vllm_config.model_config.try_get_generation_config()
    for value in (settings.get("eos_token_id"), getattr(engine.renderer.get_tokenizer(), "eos_token_id", None)):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, Iterable):
            found.update(value)
    return frozenset(found)
