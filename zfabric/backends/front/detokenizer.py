"""From tokens to text as they come, never half a character: the pieces make the text of all tokens decoded at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

#: How SentencePiece vocabularies with byte fallback name their bytes.
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE: Final = "\ufffd"
#: No character has more bytes than four, and no token fewer than one: what came before so many tokens is settled.
_SETTLED_AFTER: Final = 4
#: Tokens of a prompt that decide how the text after it begins.
_CONTEXT_TOKENS: Final = 16


class Detokenizer:
    """Decodes a growing sequence of tokens, in time independent of its length.

    Only a window is decoded: the tokens since the last two places where the text was whole. What a decoder does at the
    start of a text (dropping a space) thus happens in the window's first part, which has been given out before.

    A byte-level decoder shows an unfinished character as one U+FFFD at the end, which is held back. A byte-fallback
    decoder judges a run of byte tokens as a whole, so such a run is held back until another token ends it.

    Args:
        tokenizer: A transformers tokenizer.
        skip_special_tokens: Leave special tokens out.
        marks: Special tokens that are shown all the same, with their texts: for whoever reads the text by them.
    """

    def __init__(
        self, tokenizer: Any, *, skip_special_tokens: bool = True, marks: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # A tokenizer that has no ways of its own adds only time to what its core does.
        own = type(tokenizer)
        plain = all(
            getattr(own, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
        )
        self._core = tokenizer.backend_tokenizer if plain else None
        self._byte_fallback = tokenizer.convert_tokens_to_ids("<0x00>") not in (None, tokenizer.unk_token_id)
        self._left_out = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._marks = marks if marks and skip_special_tokens else {}
        self._window: list[int] = []
        #: How many tokens of the window, and how many characters of its text, have been given out.
        self._context = 0
        self._given = 0

    def add(self, token: int) -> str:
        """The text that this token completes; often its own, sometimes none."""
        if token in self._marks:
            # Nothing that was unfinished goes on beyond it.
            return self.finish() + self._marks[token]
        if token in self._left_out:
            return ""
        self._window.append(token)
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            return ""
        text = self._decode(self._window)
        unfinished = text.endswith(_INCOMPLETE)
        stable = len(text) - unfinished
        piece = text[self._given : stable]
        self._given = max(self._given, stable)
        if piece and not unfinished:
            self._move_on()
        elif unfinished and len(self._window) > self._context + 2 * _SETTLED_AFTER:
            self._leave_behind()
        return piece

    def go_on_after(self, tokens: Sequence[int]) -> None:
        """Begin as if these had been decoded and shown before."""
        shown = [token for token in tokens[-_CONTEXT_TOKENS:] if token not in self._left_out]
        self._window = shown
        self._context = len(shown)
        self._given = len(self._decode(shown))

    def finish(self) -> str:
        """What is still held back; nothing more will come."""
        text = self._decode(self._window)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _move_on(self) -> None:
        """Let the window begin where the text was last whole; what follows is its context for the next token."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._given = len(self._decode(self._window))

    def _leave_behind(self) -> None:
        """Bytes that make no characters come on and on: keep those that a character may still begin with."""
        self._window = self._window[-_SETTLED_AFTER:]
        self._context = 0
        self._given = len(self._decode(self._window)) - 1

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._core is not None:
            return str(self._core.decode(tokens, skip_special_tokens=self._skip))
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text
