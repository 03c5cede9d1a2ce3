"""From a request's prompt to token ids that the model knows and its context holds: bounds come before the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zfabric.backends.front.bounds import known_tokens, longest_token, what_may_fit
from zfabric.backends.front.chat import chat_text
from zfabric.errors import RequestError
from zfabric.wire.chat import ChatOptions, Message


class PromptTokens:
    """Makes tokens of prompts.

    A text of so many characters that it cannot fit, whatever its tokens, is refused (or cut) before it is tokenized, which
    takes time and memory in proportion to it.

    Args:
        tokenizer: A transformers tokenizer.
        vocabulary_size: Tokens that the model has vectors for.
        context_length: Tokens of a prompt and its answer; None if nothing is known of it.
    """

    def __init__(self, tokenizer: Any, *, vocabulary_size: int, context_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self._longest = longest_token(tokenizer)

    def make(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        token_ids: Sequence[int] | None,
        tools: list[dict[str, Any]] | None = None,
        chat: ChatOptions | None = None,
        *,
        truncate: bool = False,
        bounded: bool = True,
    ) -> list[int]:
        """Token ids of whichever prompt is given.

        Args:
            chat: What the template is told beside messages and tools.
            truncate: Its end will do, if all of it is too long: what is surely cut off is left out already.
            bounded: Whether it has to fit at all; else it is only to be counted.

        Raises:
            UnsupportedOperationError: Messages, and no chat template.
            RequestError: The template refuses the messages, an id is outside of the vocabulary, or nothing is left.
            ContextOverflowError: It cannot fit.
        """
        length = self._context_length if bounded else None
        if token_ids is not None:
            ids = list(what_may_fit(token_ids, 1, length, truncate=truncate))
        elif messages is not None:
            rendered = chat_text(self._tokenizer, messages, tools, chat=chat)
            text = what_may_fit(rendered, self._longest, length, truncate=truncate)
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            text = what_may_fit(prompt or "", self._longest, length, truncate=truncate)
            ids = self._tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise RequestError("the prompt has no tokens")
        return known_tokens(ids, self._vocabulary_size)
