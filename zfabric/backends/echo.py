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
from typing import Final

from zfabric.backends.front.bounds import context_overflow
from zfabric.backends.front.embed_inputs import check_prompt_name
from zfabric.errors import ParameterRangeError
from zfabric.limits import ECHO_TOKEN_LENGTH_MAX, ECHO_WORDS_MAX
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, FinishReason, GenerateRequest, Usage
from zfabric.wire.tasks import EmbedRequest, EmbedResult
from zfabric.worker.base import EngineLoad, StepwiseModelWorker

#: Vectors made before the event loop gets its turn.
_ROWS_AT_ONCE: Final = 256


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

    __slots__ = ("due", "limit", "position", "prompt_tokens", "resumed_after", "stop_at", "tokens")

    def __init__(self, tokens: list[str], request: GenerateRequest, due: float, context_length: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = len(tokens)
        self.position = len(request.resume_token_ids)
        self.resumed_after = request.resume_token_ids[-1] if request.resume_token_ids else None
        self.limit = min(request.sampling.max_new_tokens or len(tokens), context_length - len(tokens))
        self.stop_at = frozenset(request.sampling.stop_token_ids)
        self.due = due

    def step(self) -> int | Delta:
        """The next token, or the delta that ends the answer."""
        position = self.position
        token = position % self.prompt_tokens
        if position + 1 < self.limit and not self.stop_at:
            self.position = position + 1
            return token
        if position >= self.limit or self.resumed_after in self.stop_at:
            # The reader of an answer that another worker began has all of it but its end.
            stopped = self.resumed_after in self.stop_at
            return self._ending("stop" if stopped else "length", "", [], self.resumed_after if stopped else None)
        self.position = position + 1
        if token in self.stop_at:
            return self._ending("stop", "", [token], token)
        if self.position >= self.limit:
            return self._ending("length", self.tokens[token], [token])
        return token

    def _ending(self, reason: FinishReason, text: str, token_ids: list[int], stop_token: int | None = None) -> Delta:
        usage = Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.position)
        return Delta(text=text, token_ids=token_ids, finish_reason=reason, stop_reason=stop_token, usage=usage)


class EchoWorker(StepwiseModelWorker):
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
        self._steps_taken = self._moves = 0

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
        tokens = self._tokens_of(request)
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
        if request.prompt_name is not None:
            check_prompt_name(request.prompt_name, {})
        dimensions = request.dimensions or self.options.dimensions
        if dimensions > self.options.dimensions:
            raise ParameterRangeError(
                f"dimensions is {dimensions}, this model makes {self.options.dimensions}", parameter="dimensions"
            )
        rows: list[bytes] = []
        for text in request.inputs:
            rows.append(_vector(text, dimensions))
            if len(rows) % _ROWS_AT_ONCE == 0:
                self._moves += 1
                await asyncio.sleep(0)
        return EmbedResult(rows=len(rows), dimensions=dimensions, data=b"".join(rows))

    async def count_tokens(self, request: CountRequest) -> int:
        return len(self._split(request.plain_text()))

    def load_report(self) -> EngineLoad:
        if self._turn is not None and self._due > self._loop.time():
            # It waits by its own schedule, which may be slower than what others take for hung.
            self._moves += 1
        return EngineLoad(progress=self._steps_taken + self._moves)

    async def close(self) -> None:
        self._streams.clear()
        if self._turn is not None:
            self._turn.cancel()

    def _tokens_of(self, request: GenerateRequest) -> list[str]:
        """What the answer is made of. Raises: ContextOverflowError: The prompt is too long to be kept, or to answer."""
        ids = request.prompt_token_ids
        if ids is not None:
            self._check_length(len(ids))
            return [f"{token} " for token in ids]
        tokens = self._split(request.plain_text())
        self._check_length(len(tokens))
        return tokens

    def _split(self, text: str) -> list[str]:
        """The tokens of a text. Raises: ContextOverflowError: There are more words than are ever split."""
        words = text.split(None, ECHO_WORDS_MAX)
        if len(words) > ECHO_WORDS_MAX:
            raise context_overflow(len(words), min(ECHO_WORDS_MAX, self.options.context_length))
        tokens = [word + " " for word in words] or [" "]
        size = ECHO_TOKEN_LENGTH_MAX
        if len(text) < size:
            return tokens
        return [token[at : at + size] for token in tokens for at in range(0, len(token), size)]

    def _check_length(self, tokens: int) -> None:
        length = min(self.options.context_length, 2 * ECHO_WORDS_MAX)
        if tokens >= length:
            raise context_overflow(tokens, length)

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
        names: list[str] = []
        token_ids: list[int] = []
        texts: list[str] = []
        endings: list[tuple[str, Delta]] = []
        for request_id, stream in self._streams.items():
            if self._timed:
                if stream.due > now:
                    continue
                # Catch up by at most one interval, so that a late loop does not turn into a burst.
                stream.due = max(stream.due + interval, now)
            made = stream.step()
            if isinstance(made, int):
                names.append(request_id)
                token_ids.append(made)
                texts.append(stream.tokens[made])
            else:
                endings.append((request_id, made))
        for request_id, _ in endings:
            del self._streams[request_id]
        if names or endings:
            self._steps_taken += 1
            self.steps.emit_columns(names, token_ids, texts, endings)


def _vector(text: str | list[int], dimensions: int) -> bytes:
    seed = zlib.crc32(str(text).encode())
    values = [zlib.crc32(index.to_bytes(4, "big"), seed) / 2**32 - 0.5 for index in range(dimensions)]
    norm = sum(value * value for value in values) ** 0.5 or 1.0
    return struct.pack(f"<{dimensions}f", *(value / norm for value in values))
