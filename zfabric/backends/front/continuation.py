"""Answers that another worker began: from which tokens an engine may go on, and what its reader has already."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from zfabric.errors import BackendError
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.tool_calls import ToolCallDelta, joined_calls

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


class Unseen:
    """What the reader of a continued answer lacks: the rest is left out, by its length.

    Args:
        characters: What the reader has, of text, reasoning and calls together: `GenerateRequest.resume_characters`.
    """

    __slots__ = ("_left",)

    def __init__(self, characters: int) -> None:
        self._left = characters

    def leave_out(self, delta: Delta) -> None:
        """Keep what the reader does not have yet. Within a delta reasoning comes first, and calls last."""
        if not self._left:
            return
        delta.reasoning = self._rest(delta.reasoning)
        delta.text = self._rest(delta.text)
        delta.tool_calls = [piece for call in delta.tool_calls or () if (piece := self._rest_of(call))] or None

    def _rest(self, text: str) -> str:
        cut = min(self._left, len(text))
        self._left -= cut
        return text[cut:]

    def _rest_of(self, call: ToolCallDelta) -> ToolCallDelta | None:
        """What is left of a piece of a call; None for nothing. A name comes whole, so it is there or not."""
        if call.name is not None and self._left:
            self._left -= len(call.name)
            arguments = self._rest(call.arguments)
            return ToolCallDelta(index=call.index, arguments=arguments) if arguments else None
        arguments = self._rest(call.arguments)
        return structs.replace(call, arguments=arguments) if arguments or call.name is not None else None


class Redraw:
    """An answer that an engine draws anew from its first token: what its reader has is checked and left out.

    Args:
        request: With the tokens that its reader has.
        characters: Of what they made, that are left out here; None for all that its reader has.
    """

    __slots__ = ("_known", "_owed", "_seen", "_unseen")

    def __init__(self, request: GenerateRequest, *, characters: int | None = None) -> None:
        self._known = request.resume_token_ids
        self._seen = 0
        self._unseen = Unseen(request.resume_characters if characters is None else characters)
        self._owed: list[Delta] = []

    def leave_out(self, delta: Delta) -> bool:
        """Keep what the reader does not have yet. Returns whether that is anything.

        Raises:
            BackendError: The engine drew something else than the reader has.
        """
        self._unseen.leave_out(delta)
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
            self._owed.append(delta)
            return False
        if self._owed:
            parts = [*self._owed, delta]
            self._owed = []
            delta.text = "".join([part.text for part in parts])
            delta.reasoning = "".join([part.reasoning for part in parts])
            delta.tool_calls = joined_calls([call for part in parts for call in part.tool_calls or ()])
        return True
