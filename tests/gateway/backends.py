"""Backends that give what the echo backend does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from zfabric import (
    BackendError,
    BaseModelWorker,
    Delta,
    GenerateRequest,
    Logprob,
    ModelInfo,
    TokenLogprobs,
    ToolCallDelta,
    Usage,
)
from zfabric.wire.chat import OPTIONS
from zfabric.wire.sampling import ALL_PARAMETERS


class Caller(BaseModelWorker):
    """Thinks, says a word, and calls two functions, the arguments in pieces."""

    parameters = ALL_PARAMETERS | set(OPTIONS)

    async def load(self) -> ModelInfo:
        return ModelInfo(name="caller", capabilities=["generate", "chat"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if not request.tools:
            yield Delta(text="no tools", token_ids=[1], finish_reason="stop")
            return
        yield Delta(reasoning="hm, ", token_ids=[1])
        yield Delta(reasoning="weather", token_ids=[2])
        yield Delta(text="Let me look.", token_ids=[3])
        yield Delta(tool_calls=[ToolCallDelta(index=0, id="call_1", name="weather")], token_ids=[4])
        yield Delta(tool_calls=[ToolCallDelta(index=0, arguments='{"city": ')], token_ids=[5])
        yield Delta(tool_calls=[ToolCallDelta(index=0, arguments='"Oslo"}')], token_ids=[6])
        yield Delta(tool_calls=[ToolCallDelta(index=1, id="call_2", name="time", arguments="{}")], token_ids=[7])
        usage = Usage(prompt_tokens=9, completion_tokens=8, cached_tokens=4)
        yield Delta(finish_reason="tool_calls", token_ids=[8], usage=usage)


class Recorder(BaseModelWorker):
    """Notes what it is asked, and gives two tokens with log-probabilities where they are wanted, or a text."""

    parameters = ALL_PARAMETERS | set(OPTIONS)

    def __init__(self, text: str = "") -> None:
        self.requests: list[GenerateRequest] = []
        self._text = text

    async def load(self) -> ModelInfo:
        return ModelInfo(
            name="recorder", aliases=["alias/of-it"], capabilities=["generate", "chat", "multimodal"], context_length=64
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.requests.append(request)
        if self._text:
            yield Delta(text=self._text, token_ids=[7], finish_reason="stop")
            return
        top = request.sampling.logprobs
        for index in range(request.sampling.n):
            for token, text in ((7, "gr"), (8, "\N{LATIN SMALL LETTER U WITH DIAERESIS}n")):
                entry = TokenLogprobs(Logprob(token, -0.5, text), [Logprob(token, -0.5, text), Logprob(9, -1.5, "x")])
                logprobs = [entry] if top is not None else None
                yield Delta(text=text, token_ids=[token], index=index, logprobs=logprobs)
            yield Delta(finish_reason="stop", token_ids=[2], index=index, text="",
                        logprobs=[TokenLogprobs(Logprob(2, -0.1, ""))] if top is not None else None)  # fmt: skip


class Slow(BaseModelWorker):
    """Says a word, and then nothing until it is let go on. Notes when it is stopped."""

    parameters = ALL_PARAMETERS | set(OPTIONS)

    def __init__(self, *, silent: bool = False) -> None:
        self.go_on = asyncio.Event()
        self.begun = asyncio.Event()
        self.stopped = asyncio.Event()
        self._silent = silent

    async def load(self) -> ModelInfo:
        return ModelInfo(name="slow", capabilities=["generate", "chat"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.begun.set()
        try:
            if not self._silent:
                yield Delta(text="begun ", token_ids=[1])
            await self.go_on.wait()
            yield Delta(text="done", token_ids=[2], finish_reason="stop")
        finally:
            self.stopped.set()


class Broken(BaseModelWorker):
    """Fails: at once, or after a word where the prompt says "later"."""

    parameters = ALL_PARAMETERS | set(OPTIONS)

    async def load(self) -> ModelInfo:
        return ModelInfo(name="broken", capabilities=["generate", "chat"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if "later" in request.plain_text():
            yield Delta(text="begun ", token_ids=[1])
            await asyncio.sleep(0.05)
        raise BackendError("the engine failed")
