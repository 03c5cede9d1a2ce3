"""From a request's prompt to token ids, and whether they fit: what backends with a tokenizer share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zfabric.backends.front.chat import chat_text
from zfabric.errors import ContextOverflowError, RequestError
from zfabric.wire.payloads import Message


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
        return known_tokens(token_ids, vocabulary_size or len(tokenizer))
    if messages is not None:
        text = chat_text(tokenizer, messages, tools)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise RequestError("the prompt has no tokens")
    return ids


def known_tokens(token_ids: Sequence[int], vocabulary_size: int) -> list[int]:
    """A copy of token ids that a caller gave.

    Raises:
        RequestError: One is outside of the vocabulary.
    """
    wrong = next((token for token in token_ids if not 0 <= token < vocabulary_size), None)
    if wrong is not None:
        raise RequestError(f"token id {wrong} is outside of the vocabulary of {vocabulary_size}", token_id=wrong)
    return list(token_ids)


def fit(tokens: list[int], length: int, *, truncate: bool) -> list[int]:
    """The prompt, if it leaves room for one token at least; else its end, if that is allowed.

    Raises:
        ContextOverflowError: It does not fit.
    """
    if len(tokens) < length:
        return tokens
    if truncate:
        return tokens[len(tokens) - length + 1 :]
    raise context_overflow(len(tokens), length)


def context_overflow(tokens: int, length: int) -> ContextOverflowError:
    """The error of a prompt of so many tokens that does not fit a context of such a length."""
    return ContextOverflowError(
        f"prompt of {tokens} tokens leaves no room for an answer, context is {length}",
        prompt_tokens=tokens,
        context_length=length,
    )
