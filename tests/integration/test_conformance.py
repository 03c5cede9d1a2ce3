"""What a backend owes, asked of those that keep it, and of such that break one promise each."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec import structs

import zfabric.testing
from tests.integration.test_serving import reverser
from zfabric import (
    CountRequest,
    Delta,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    ModelInfo,
    TextModelWorker,
    Usage,
)
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import ContextOverflowError


class Counting(TextModelWorker):
    """Says the numbers from 1; a seed shifts them."""

    sampling = frozenset({"temperature", "seed", "ignore_eos"})
    repeatable = True

    async def load(self) -> ModelInfo:
        return ModelInfo(name="counting", context_length=200)

    def count(self, prompt: str) -> int:
        words = len(prompt.split())
        if words > 200:
            raise ContextOverflowError("too long", prompt_tokens=words, context_length=200)
        return words

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        for number in range(1, 60):
            await asyncio.sleep(0)
            yield f"{number + (request.sampling.seed or 0) % 1_000} "


@pytest.mark.parametrize(
    "make", [lambda: EchoWorker(EchoOptions(context_length=300)), reverser, Counting], ids=["echo", "readme", "text"]
)
async def test_who_keeps_all_of_it(make: Callable[[], Any]) -> None:
    (report,) = await zfabric.testing.conformance(make(), prompt="one two three four five six")
    assert report.broken == []
    assert sum(finding.kept is True for finding in report.findings) >= 9
    assert "BROKEN" not in str(report)


async def test_what_text_from_text_is_given_is_asked_for() -> None:
    """Stop strings, choices, echo, chat, continuation: all of it without a word of the author's."""
    (report,) = await zfabric.testing.conformance(Counting())
    asked = {finding.promise for finding in report.findings if finding.kept}
    for word in ("stop string", "n choices", "echo", "chat", "broke off", "seed", "both numbers"):
        assert any(word in promise for promise in asked), word


class Wrong(Counting):
    """Changes the deltas of an answer."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        return self.changed(request, super().generate(request))

    async def changed(self, request: GenerateRequest, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        async for delta in deltas:
            yield delta


class TooLong(Wrong):
    async def changed(self, request: GenerateRequest, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        longer = structs.replace(request, sampling=structs.replace(request.sampling, max_new_tokens=20))
        async for delta in Counting.generate(self, longer):
            yield delta


class MiscountsUsage(Wrong):
    async def changed(self, request: GenerateRequest, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        async for delta in deltas:
            delta.usage = Usage(3, 1) if delta.usage is not None else None
            yield delta


class Random(Wrong):
    async def changed(self, request: GenerateRequest, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        async for delta in deltas:
            yield structs.replace(delta, text=str(random.random()) if delta.text else "")


class IgnoresStops(Counting):
    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        return super().generate(structs.replace(request, sampling=structs.replace(request.sampling, stop=())))


class BeginsAnew(Counting):
    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        return super().generate(structs.replace(request, resume_token_ids=[], resume_characters=0))


class CountsOtherwise(Counting):
    async def count_tokens(self, request: CountRequest) -> int:
        return await super().count_tokens(request) + 7


class TakesEveryLength(Counting):
    def count(self, prompt: str) -> int:
        return len(prompt.split())


class KeepsItsRoom(Counting):
    """What is given up before its end holds room for ever."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(4)

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        kept = request.sampling.max_new_tokens is None
        if kept:
            await self.room.acquire()
        async for piece in super().complete(prompt, request):
            yield piece


class OddVectors(Counting):
    async def load(self) -> ModelInfo:
        return ModelInfo(name="counting", dimensions=4, capabilities=["embed"])

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return EmbedResult(rows=len(request.inputs), dimensions=2, data=bytes(8 * len(request.inputs)))


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (TooLong, "no longer than max_new_tokens"),
        (MiscountsUsage, "usage counts"),
        (Random, "same prompt has the same answer"),
        (Random, "same seed"),
        (IgnoresStops, "stop string"),
        (BeginsAnew, "broke off"),
        (CountsOtherwise, "usage counts"),
        (TakesEveryLength, "both numbers"),
        (OddVectors, "vector of the announced length"),
    ],
)
async def test_who_breaks_a_promise_is_told_which(broken: type[Counting], promise: str) -> None:
    (report,) = await zfabric.testing.conformance(broken(), check=False)
    assert any(promise in finding.promise for finding in report.broken), str(report)
    assert f"BROKEN  {report.broken[0].promise}" in str(report)
    with pytest.raises(AssertionError, match="BROKEN"):
        await zfabric.testing.conformance(broken())


async def test_who_never_lets_go_of_what_was_cancelled_is_told() -> None:
    (report,) = await zfabric.testing.conformance(KeepsItsRoom(), slots=4, limit_s=2.0, check=False)
    found = [finding for finding in report.broken if "cancelled" in finding.promise]
    assert found, str(report)
    assert "within 2 s" in found[0].why
