"""From a request's prompt to token ids, and how long a context is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from zfabric.errors import ContextOverflowError, RequestError, UnsupportedOperationError
from zfabric.wire.payloads import Message

#: Where configurations keep the length of the context, in FastChat's order.
_LENGTH_KEYS: Final = (
    "max_position_embeddings",
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
)
#: FastChat's value for a configuration that tells none.
_LENGTH_DEFAULT: Final = 2_048


def context_length(config: Any) -> int:
    """Tokens of prompt and answer, as FastChat finds them: the first key that is set, times the rope scaling factor."""
    scaling = getattr(config, "rope_scaling", None) or {}
    factor = float(scaling.get("factor") or 1.0) if scaling.get("rope_type", scaling.get("type")) != "llama3" else 1.0
    for key in _LENGTH_KEYS:
        value = getattr(config, key, None)
        if value:
            return int(factor * value)
    return _LENGTH_DEFAULT


def prompt_tokens(
    tokenizer: Any,
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    tools: list[dict[str, Any]] | None = None,
    *,
    vocabulary_size: int | None = None,
) -> list[int]:
    """Token ids of whichever prompt is given.

    Raises:
        UnsupportedOperationError: Messages, and no chat template.
        RequestError: The template refuses the messages, an id is outside of the vocabulary, or nothing is left.
    """
    if token_ids is not None:
        size = vocabulary_size or len(tokenizer)
        wrong = next((token for token in token_ids if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside of the vocabulary of {size}", token_id=wrong)
        return list(token_ids)
    if messages is not None:
        text = chat_text(tokenizer, messages, tools)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise RequestError("the prompt has no tokens")
    return ids


def fit(tokens: list[int], length: int, *, truncate: bool) -> list[int]:
    """The prompt, if it leaves room for one token at least; else its end, if that is allowed.

    Raises:
        ContextOverflowError: It does not fit.
    """
    if len(tokens) < length:
        return tokens
    if truncate:
        return tokens[len(tokens) - length + 1 :]
    raise ContextOverflowError(
        f"prompt of {len(tokens)} tokens leaves no room for an answer, context is {length}",
        prompt_tokens=len(tokens),
        context_length=length,
    )


def chat_text(tokenizer: Any, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
    """What the chat template makes of messages.

    Raises:
        UnsupportedOperationError: There is no template.
        RequestError: It refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UnsupportedOperationError(
            "this model's tokenizer has no chat template; send a prompt, or start the worker with --chat-template"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # noqa: BLE001 — templates are programs and raise what they like
        raise RequestError(f"the chat template refuses these messages: {error}") from None
    return text
