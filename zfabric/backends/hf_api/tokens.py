"""A remote model's own tokenizer, where the models file names one: counts, and prompts for exact continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zfabric.backends.front.bounds import known_tokens, longest_token
from zfabric.backends.front.prompts import PromptTokens
from zfabric.errors import ConfigurationError
from zfabric.wire.chat import ChatOptions, Message

if TYPE_CHECKING:
    from zfabric.backends.front.detokenizer import Detokenizer


class Tokenizer:
    """Loads on construction, which takes seconds: do it on a thread.

    Raises:
        ConfigurationError: It cannot be loaded.
    """

    def __init__(self, directory: str, model: str) -> None:
        try:
            from transformers import AutoTokenizer

            self._inner: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except ImportError as error:
            raise ConfigurationError(
                f"model {model!r}, tokenizer: needs zfabric[transformers]: {error}", model=model, key="tokenizer"
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"model {model!r}, tokenizer: {directory!r} cannot be loaded", model=model, key="tokenizer"
            ) from error

        self._tokens = PromptTokens(self._inner, vocabulary_size=len(self._inner), context_length=None)
        #: Characters of the longest token.
        self.longest = longest_token(self._inner)

    @property
    def has_template(self) -> bool:
        return self._inner.chat_template is not None

    def prompt(
        self,
        prompt: str | None,
        messages: list[Message] | None,
        tools: list[dict[str, Any]] | None = None,
        chat: ChatOptions | None = None,
    ) -> list[int]:
        """Tokens of a prompt. Raises: RequestError, UnsupportedOperationError."""
        return self._tokens.make(prompt, messages, None, tools, chat)

    @property
    def end_tokens(self) -> set[int]:
        """Tokens that end an answer of themselves, as far as the tokenizer knows."""
        return set() if self._inner.eos_token_id is None else {int(self._inner.eos_token_id)}

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """One for one answer."""
        from zfabric.backends.front.detokenizer import Detokenizer

        return Detokenizer(self._inner, skip_special_tokens=skip_special_tokens)

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens. Raises: RequestError: The tokenizer does not have one of them."""
        known = known_tokens(token_ids, len(self._inner))
        return str(self._inner.decode(known, skip_special_tokens=skip_special_tokens))

    def text_of(self, token: int) -> str:
        """Text of one token alone."""
        return str(self._inner.decode([token], clean_up_tokenization_spaces=False))

    def count_text(self, text: str) -> int:
        """Tokens of an answer's text; an estimate, since the model may have cut it otherwise."""
        return len(self._inner(text, add_special_tokens=False, verbose=False)["input_ids"])
