"""Answers on their way from a worker to a client: runs of a stream, and how a request ended."""

from __future__ import annotations

from typing import Any

from msgspec import Raw, Struct

from zfabric.errors import Detail
from zfabric.wire.fields import NIL
from zfabric.wire.payloads import FinishReason, TokenLogprobs, Usage
from zfabric.wire.tool_calls import ToolCallDelta


class ChunkExtra(Struct, array_like=True, kw_only=True, gc=False):
    """The rare parts of a chunk, kept out of the common one.

    Attributes:
        units: How far the chunk goes; None where that is the number of its token ids, or 1 if it has none.
        worker: Name of the worker, on the first chunk of an attempt.
        finish_reason: Why the choice has ended, on its last chunk.
        logprobs: One for each token, if asked for.
        prompt_logprobs: One for each token of the prompt, None for the first; on the first chunk, if asked for.
        exact: On the first chunk of an attempt: another worker would draw the same text from the request as the client has
            it, so the answer can be continued elsewhere. The worker alone knows whether it honours the client's drawn seed.
        reasoning: New text of what the model says to itself, which is no part of `text`.
        tool_calls: New pieces of tool calls, which are no part of `text`.
        extra: What the engine tells of the request besides, by its own names; a later chunk's value replaces an earlier one's.
        stop_reason: The stop string or the stop token that ended the choice, on its last chunk, where the worker knows.
    """

    units: int | None = None
    worker: str | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    exact: bool = False
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] | None = None
    extra: dict[str, Any] | None = None
    stop_reason: str | int | None = None

    @property
    def plain(self) -> bool:
        """Whether it says nothing that belongs to the answer itself."""
        return (
            self.finish_reason is None
            and self.logprobs is None
            and self.prompt_logprobs is None
            and not self.reasoning
            and not self.tool_calls
            and not self.extra
        )

    @property
    def characters(self) -> int:
        """Length of what an answer has beside its text, as a continuation counts it: `resume_characters`."""
        calls = self.tool_calls or ()
        return len(self.reasoning) + sum([len(call.name or "") + len(call.arguments) for call in calls])


class Chunk(Struct, array_like=True, gc=False):
    """A run of one stream: units [offset, offset + units) of attempt `attempt` of `request`. On the wire many of them are
    columns (`wire.chunks`).

    Attributes:
        request: Whose answer it is.
        attempt: Which attempt of it.
        index: The choice, from 0.
        offset: Its first unit, counted from the answer's start over all choices of the request.
        text: New text.
        token_ids: New tokens; empty where the engine tells none.
        extra: What few chunks have.
    """

    request: int
    attempt: int
    index: int
    offset: int
    text: str
    token_ids: list[int]
    extra: ChunkExtra | None = None


class Outcome(Struct, array_like=True, kw_only=True):
    """How a request ended: the rest of its terminal, in the order of the envelope's ends.

    Attributes:
        units: The offset at the end of the stream, if a worker ended it; 0 in terminals of the controller's own, and of
            operations that are no stream.
        usage: Token counts, where the worker has some.
        message: What the error says, for people.
        details: The values in it, for programs.
        result: What the operation gives, if it is no stream; nil else.
        labels: What the columns of the result are called, where it has columns with names.
    """

    units: int = 0
    usage: Usage | None = None
    message: str = ""
    details: dict[str, Detail] = {}
    result: Raw = NIL
    labels: list[str] = []
