"""Whole answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from zfabric.errors import ProtocolError
from zfabric.wire.payloads import FinishReason, Logprob, TokenLogprobs, Usage
from zfabric.wire.tool_calls import ToolCallDelta


class ToolCall:
    """A call that a model asks for.

    Attributes:
        id: What the message with the result names as `tool_call_id`.
        name: The function's.
    """

    __slots__ = ("_arguments", "id", "name")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self._arguments: list[str] = []

    @property
    def arguments(self) -> str:
        """A JSON text, as far as it was read. A model may write one that is broken."""
        if len(self._arguments) > 1:
            self._arguments = ["".join(self._arguments)]
        return self._arguments[0] if self._arguments else ""

    def extend(self, piece: ToolCallDelta) -> None:
        """Add what arrived."""
        self.id = piece.id or self.id
        self.name = piece.name or self.name
        self._arguments.append(piece.arguments)

    def to_dict(self) -> dict[str, Any]:
        """The call as a message of the assistant holds it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def __repr__(self) -> str:
        return f"ToolCall(id={self.id!r}, name={self.name!r}, arguments={self.arguments!r})"


class Classification(list[float]):
    """The probability of each class of one text: a list of them that knows what the classes are called.

    Args:
        probabilities: In the order of the classes.
        labels: What the classes are called, in the same order; empty where the model does not say.

    Example:
        >>> [mood] = client.classify("sentiment", "What a day!")
        >>> mood.label, max(mood)
    """

    def __init__(self, probabilities: Iterable[float], labels: Sequence[str] = ()) -> None:
        super().__init__(probabilities)
        self.labels = tuple(labels)

    @property
    def label(self) -> str | None:
        """The likeliest class; None where the model does not say what classes are called."""
        return self.labels[self.index(max(self))] if self.labels and self else None


class Choice:
    """One of the n choices of an answer.

    Attributes:
        index: 0 … n-1.
        token_ids, finish_reason: As far as it was read.
        stop_reason: The stop string, or the token of `stop_token_ids`, that ended it; None where something else did, or where
            the engine does not tell.
        logprobs: One entry per token, if asked for.
        tool_calls: Calls in the order of their beginnings.
    """

    __slots__ = (
        "_parts", "_reasoning", "finish_reason", "index", "logprobs", "stop_reason", "token_ids", "tool_calls",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[TokenLogprobs] | None = None
        self.tool_calls: list[ToolCall] = []
        self._parts: list[str] = []
        self._reasoning: list[str] = []

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

    @property
    def reasoning(self) -> str:
        """What the model said to itself so far, where its backend tells that from the answer."""
        if len(self._reasoning) > 1:
            self._reasoning = ["".join(self._reasoning)]
        return self._reasoning[0] if self._reasoning else ""

    def extend_parts(self, reasoning: str, calls: Iterable[ToolCallDelta]) -> None:
        """Add what arrived beside text. Raises: ProtocolError: A piece is of a call that nothing began."""
        self._reasoning.append(reasoning)
        for piece in calls:
            if piece.index == len(self.tool_calls):
                self.tool_calls.append(ToolCall())
            if not 0 <= piece.index < len(self.tool_calls):
                raise ProtocolError(f"a piece is of call {piece.index}, of {len(self.tool_calls)}", index=piece.index)
            self.tool_calls[piece.index].extend(piece)

    @property
    def message(self) -> dict[str, Any]:
        """The choice as the next message of its chat: text and calls, without reasoning.

        Example:
            >>> messages.append(completion.choices[0].message)
            >>> for call in completion.choices[0].tool_calls:
            ...     messages.append({"role": "tool", "tool_call_id": call.id, "content": run(call.name, call.arguments)})
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain values; see `Completion.to_dict`."""
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "logprobs": _logprobs(self.logprobs),
            "reasoning": self.reasoning,
            "tool_calls": [call.to_dict() for call in self.tool_calls],
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
        extra: What the engine told besides, by its own names.
    """

    request_id: str
    model: str
    worker: str | None
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

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
    def reasoning(self) -> str:
        """What the model said to itself in the first choice."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Calls of the first choice."""
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        """The first choice as the next message of its chat, calls included; see `Choice.message`."""
        return self.choices[0].message

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
            "extra": self.extra,
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
