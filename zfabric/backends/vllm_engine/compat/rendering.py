"""From texts, messages and tokens to an engine's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


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

    chat = ChatParams(chat_template=template, chat_template_kwargs=dict(arguments))
    parameters = _unbounded(engine.renderer.default_chat_tok_params)
    _, (rendered,) = await engine.renderer.render_chat_async([messages], chat, parameters)
    return rendered


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
