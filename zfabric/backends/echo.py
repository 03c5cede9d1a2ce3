"""The reference backend: a fixed schedule of tokens and no computation.

Used by tests, benchmarks and the tutorial. Its answer is the prompt's words again and again, so the text of an answer
is a function of its prompt and its position, and any worker can go on where another stopped.
"""

from __future__ import annotations

import asyncio
import math
import struct
import zlib
from dataclasses import dataclass

from zfabric.backends.prompts import context_overflow
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import (
    CountRequest,
    Delta,
    EmbedRequest,
    EmbedResult,
    FinishReason,
    GenerateRequest,
    Message,
    Usage,
)
from zfabric.worker.base import BaseModelWorker, EngineLoad


@dataclass(frozen=True, kw_only=True)
class EchoOptions:
    """Options of the echo backend.

    Attributes:
        model_names: Names it serves; the first is the model, the others aliases.
        tokens_per_second: Per stream; 0 is as fast as the event loop turns.
        aligned: Paced streams all step at the same moments, as an engine's batch does.
        first_token_ms: Time before the first token, as a prefill would take.
        context_length: Tokens of prompt and answer together.
        dimensions: Length of its embeddings.
    """

    model_names: tuple[str, ...] = ("echo",)
    tokens_per_second: float = 0.0
    aligned: bool = False
    first_token_ms: float = 0.0
    context_length: int = 1_000_000
    dimensions: int = 8


class _Stream:
    """One running answer."""

    __slots__ = ("due", "limit", "position", "prompt_tokens", "stop_at", "tokens")

    def __init__(self, tokens: list[str], request: GenerateRequest, due: float, context_length: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = len(tokens)
        self.position = len(request.resume_token_ids)
        self.limit = min(request.sampling.max_new_tokens or len(tokens), context_length - len(tokens))
        self.stop_at = frozenset(request.sampling.stop_token_ids)
        self.due = due

    def step(self) -> Delta:
        position = self.position
        token = position % self.prompt_tokens
        self.position = position + 1
        reason: FinishReason | None = None
        if token in self.stop_at:
            reason = "stop"
        elif self.position >= self.limit:
            reason = "length"
        if reason is None:
            return Delta(text=self.tokens[token], token_ids=[token])
        text = "" if reason == "stop" else self.tokens[token]
        return Delta(
            text=text,
            token_ids=[token],
            finish_reason=reason,
            usage=Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.position),
        )


class EchoWorker(BaseModelWorker):
    """Says the prompt's words again, one token a step, all streams in one step.

    Token ids are positions in the prompt. `max_new_tokens=None` says the prompt once.
    """

    parameters = frozenset({"max_new_tokens", "stop_token_ids", "seed", "temperature", "ignore_eos"})
    slots = 1_024
    Options = EchoOptions

    def __init__(self, options: EchoOptions | None = None) -> None:
        self.options = options or EchoOptions()
        self._streams: dict[str, _Stream] = {}
        self._interval = 1 / self.options.tokens_per_second if self.options.tokens_per_second else 0.0
        self._timed = bool(self._interval or self.options.first_token_ms)
        self._turn: asyncio.Handle | None = None
        self._due = 0.0
        self._steps_taken = 0

    async def load(self) -> ModelInfo:
        self._loop = asyncio.get_running_loop()
        name, *aliases = self.options.model_names
        return ModelInfo(
            name=name,
            aliases=aliases,
            context_length=self.options.context_length,
            capabilities=["generate", "embed", "count_tokens", "chat", "resume"],
            parameters=sorted(self.parameters),
            dimensions=self.options.dimensions,
            details={"engine": "echo", "tokens_per_second": self.options.tokens_per_second},
        )

    def begin(self, request: GenerateRequest) -> None:
        tokens = _prompt_tokens(request.prompt, request.messages, request.prompt_token_ids)
        if len(tokens) >= self.options.context_length:
            raise context_overflow(len(tokens), self.options.context_length)
        now = due = self._loop.time()
        if self.options.first_token_ms:
            due += self.options.first_token_ms / 1_000
        if self.options.aligned and self.options.tokens_per_second:
            due = math.ceil(due * self.options.tokens_per_second) / self.options.tokens_per_second
        self._streams[request.request_id] = _Stream(tokens, request, due, self.options.context_length)
        self._come_back(due, now)

    def abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        dimensions = request.dimensions or self.options.dimensions
        rows = [_vector(str(text), dimensions) for text in request.inputs]
        return EmbedResult(rows=len(rows), dimensions=dimensions, data=b"".join(rows))

    async def count_tokens(self, request: CountRequest) -> int:
        return len(_prompt_tokens(request.prompt, request.messages, None))

    def load_report(self) -> EngineLoad:
        return EngineLoad(progress=self._steps_taken)

    async def close(self) -> None:
        self._streams.clear()
        if self._turn is not None:
            self._turn.cancel()

    def _come_back(self, due: float, now: float) -> None:
        """Have the next step made no later than this."""
        if self._turn is not None:
            if self._due <= due:
                return
            self._turn.cancel()
        self._due = due
        self._turn = self._loop.call_soon(self._run) if due <= now else self._loop.call_at(due, self._run)

    def _run(self) -> None:
        """Step all streams that are due; with streams that are always due, once in each turn of the loop."""
        self._turn = None
        now = self._loop.time()
        self._step(now, self._interval)
        if self._streams:
            soonest = min([stream.due for stream in self._streams.values()]) if self._timed else now
            self._come_back(soonest, now)

    def _step(self, now: float, interval: float) -> None:
        step: list[tuple[str, Delta]] = []
        for request_id, stream in list(self._streams.items()):
            if stream.due > now:
                continue
            delta = stream.step()
            # Catch up by at most one interval, so that a late loop does not turn into a burst.
            stream.due = max(stream.due + interval, now)
            step.append((request_id, delta))
            if delta.finish_reason is not None:
                del self._streams[request_id]
        if step:
            self._steps_taken += 1
            self.steps.emit(step)


def _prompt_tokens(prompt: str | None, messages: list[Message] | None, ids: list[int] | None) -> list[str]:
    if ids is not None:
        return [f"{token} " for token in ids]
    if messages is not None:
        prompt = " ".join(str(message.get("content", "")) for message in messages)
    return [word + " " for word in (prompt or "").split()] or [" "]


def _vector(text: str, dimensions: int) -> bytes:
    values = [zlib.crc32(f"{index}:{text}".encode()) / 2**32 - 0.5 for index in range(dimensions)]
    norm = sum(value * value for value in values) ** 0.5 or 1.0
    return struct.pack(f"<{dimensions}f", *(value / norm for value in values))
