"""An answer that goes on after tokens its reader has: its text is made here, since the server's decoder starts anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from zfabric.backends.front.stop_strings import StopStrings
from zfabric.wire.payloads import FinishReason, GenerateRequest

if TYPE_CHECKING:
    from zfabric.backends.hf_api.tokens import Tokenizer


class Continued:
    """The text of such an answer, from its first token.

    Args:
        tokenizer: Of the model.
        request: With the tokens that its reader has.
        stops: Of the answer; what the reader has goes through it first.

    Attributes:
        reason: Set if the answer had ended with what the reader has, and only its end got lost.
    """

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest, stops: StopStrings) -> None:
        sampling, drawn = request.sampling, request.resume_token_ids
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=sampling.skip_special_tokens)
        self._skip = request.resume_characters
        self.reason: FinishReason | None = None
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else tokenizer.end_tokens)
        ended = drawn[-1] in ends and len(drawn) > sampling.min_new_tokens
        text, stopped = stops.add("".join(map(self._detokenizer.add, drawn[:-1] if ended else drawn)))
        if ended or stopped:
            self.reason = "stop"
        elif len(drawn) >= (sampling.max_new_tokens or len(drawn) + 1):
            self.reason = "length"
        if self.reason is not None and not stopped:
            text += stops.finish() + self._detokenizer.finish()
        self._owed = self._unseen(text)

    def add(self, token_ids: Sequence[int], *, last: bool, ended: bool) -> str:
        """Text of further tokens.

        Args:
            last: Nothing comes after these.
            ended: The last of them ended the answer, and has no text.
        """
        text = "".join(map(self._detokenizer.add, token_ids[:-1] if ended else token_ids))
        return text + self._detokenizer.finish() if last else text

    def shown(self, text: str) -> str:
        """What the reader lacks, once stop strings have been looked for."""
        text = self._owed + self._unseen(text)
        self._owed = ""
        return text

    def _unseen(self, text: str) -> str:
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]
