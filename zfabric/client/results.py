"""Whole answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from zfabric.wire.payloads import FinishReason, Logprob, TokenLogprobs, Usage


class Choice:
    """One of the n choices of an answer.

    Attributes:
        index: 0 … n-1.
        token_ids, finish_reason: As far as it was read.
        logprobs: One entry per token, if asked for.
    """

    __slots__ = ("_parts", "finish_reason", "index", "logprobs", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[TokenLogprobs] | None = None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """The text so far. Joined when asked for: appending to a string would copy it for each token."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def extend(self, text: str, token_ids: list[int]) -> None:
        """Add what arrived."""
        self._parts.append(text)
        self.token_ids += token_ids

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain values; see `Completion.to_dict`."""
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "logprobs": _logprobs(self.logprobs),
        }

    def __repr__(self) -> str:
        return f"Choice(index={self.index}, text={self.text!r}, finish_reason={self.finish_reason!r})"


@dataclass(slots=True)
class Completion:
    """A whole answer.

    Attributes:
        request_id: The request's name in logs.
        model: As asked for.
        worker: Who finished it.
        choices: n of them, by index.
        usage: Exact token counts.
        prompt_logprobs: If asked for.
    """

    request_id: str
    model: str
    worker: str | None
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first choice, if asked for."""
        return self.choices[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """The answer as dicts, lists, texts and numbers, by the names of the attributes: what `json.dumps` takes.

        Example:
            >>> completion = client.generate("echo", "a b", max_new_tokens=2)
            >>> completion.to_dict()["choices"][0]["text"]
            'a b '
        """
        return {
            "request_id": self.request_id,
            "model": self.model,
            "worker": self.worker,
            "choices": [choice.to_dict() for choice in self.choices],
            "usage": {**msgspec.structs.asdict(self.usage), "total_tokens": self.usage.total_tokens},
            "prompt_logprobs": _logprobs(self.prompt_logprobs),
        }


def _logprobs(entries: list[TokenLogprobs] | list[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    if entries is None:
        return None
    return [
        None if entry is None else {**_logprob(entry.token), "top": [_logprob(other) for other in entry.top]}
        for entry in entries
    ]


def _logprob(entry: Logprob) -> dict[str, Any]:
    return msgspec.structs.asdict(entry)
