"""Answers that another worker began: from which tokens an engine may go on, and what its reader has already."""

from __future__ import annotations

from typing import Final

from zfabric.errors import BackendError
from zfabric.wire.payloads import Delta, GenerateRequest

#: What depends on tokens drawn before in a way that a prompt which holds them does not bring about.
_REMEMBERING: Final = (
    "presence_penalty", "frequency_penalty", "bad_words", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar",
)  # fmt: skip


def continues(request: GenerateRequest) -> bool:
    """Whether an answer goes on as it would have from a prompt that holds what was drawn.

    It does not with a seed, since the generator starts anew, nor where the sampler has to remember what it drew.
    """
    sampling = request.sampling
    if not sampling.greedy and sampling.seed is not None:
        return False
    wanted = (request.response_format or {}).get("type", "text")
    changed = sampling.changed()
    return wanted == "text" and not any(name in changed for name in _REMEMBERING)


class Redraw:
    """An answer that an engine draws anew from its first token: what its reader has is checked and left out.

    Args:
        request: With the tokens, and the characters of their text, that its reader has.
    """

    __slots__ = ("_cut", "_known", "_owed", "_seen")

    def __init__(self, request: GenerateRequest) -> None:
        self._known = request.resume_token_ids
        self._seen = 0
        self._cut = request.resume_characters
        self._owed = ""

    def leave_out(self, delta: Delta) -> bool:
        """Keep what the reader does not have yet. Returns whether that is anything.

        Raises:
            BackendError: The engine drew something else than the reader has.
        """
        cut = min(self._cut, len(delta.text))
        self._cut -= cut
        self._owed += delta.text[cut:]
        rest = self._known[self._seen :]
        again = delta.token_ids[: len(rest)]
        if again != rest[: len(again)] or (delta.finish_reason is not None and len(again) < len(rest)):
            raise BackendError(
                f"the answer cannot go on: drawn again, it differs after {self._seen} tokens", tokens=self._seen
            )
        self._seen += len(again)
        delta.token_ids = delta.token_ids[len(again) :]
        if delta.logprobs is not None:
            delta.logprobs = delta.logprobs[len(again) :]
        if rest and not delta.token_ids and delta.finish_reason is None:
            # Text of tokens that the reader has, and the text not, goes out with the next token.
            return False
        delta.text, self._owed = self._owed, ""
        return True
