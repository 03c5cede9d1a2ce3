"""Lengths that a context does not have: OpenAI's API refuses them before anything is generated, where the fabric takes a length
for an upper bound."""

from __future__ import annotations

from typing import Any, Final

from zfabric.errors import ContextOverflowError, UnsupportedOperationError
from zfabric.gateway.call import Call
from zfabric.gateway.counts import prompt_tokens
from zfabric.gateway.generation import Ask

#: Tokens that chat templates add to a prompt at most, but for tools: names of roles, dates, a message of the system's.
TEMPLATE_TOKENS: Final = 1_024


async def check_lengths(call: Call, asks: list[Ask]) -> None:
    """Check that each prompt and its answer fit the model's context together.

    A prompt has no more tokens than its request has bytes, and what a template adds. Where so many leave room nothing is
    counted, so that only long answers cost one more question. Images are not counted, nor what a model cannot count.

    Raises:
        ContextOverflowError: One does not fit.
        FabricError: A prompt is wrong, or the caller went away.
    """
    for ask in asks:
        length = ask.options.get("max_tokens")
        if not isinstance(length, int) or length <= 0 or ask.options.get("truncate_prompt"):
            continue
        model = await call.fabric.model(ask.model)
        context = 0 if model is None else model.context_length
        if not context or length + len(call.body) + TEMPLATE_TOKENS <= context:
            continue
        tokens = 1
        if length < context and not _has_images(ask.options.get("messages") or ()):
            try:
                tokens = await call.unless_left(prompt_tokens(call, ask))
            except UnsupportedOperationError:
                continue
        # A prompt that leaves no room at all has an error of its own.
        if tokens < context and tokens + length > context:
            raise ContextOverflowError(
                f"max_tokens is {length}, beside a prompt of {tokens} tokens or more: context is {context}",
                prompt_tokens=tokens, context_length=context,
            )  # fmt: skip


def _has_images(messages: Any) -> bool:
    contents = [message.get("content") for message in messages]
    return any(isinstance(content, list) and not all(map(_is_text, content)) for content in contents)


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and "text" in part)
