"""What a backend owes, asked of those that keep it, and of such that break one promise each."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from msgspec import structs

import zfabric.testing
from tests.integration.bare_worker import bare_worker, dispatch
from tests.integration.test_serving import reverser
from zfabric import (
    CountRequest,
    Delta,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    ModelInfo,
    SamplingParams,
    TextModelWorker,
    Usage,
)
from zfabric.backends import front
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.backends.front import text_of
from zfabric.errors import ContextOverflowError, UnsupportedParameterError

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "backends.md").read_text()


class Counting(TextModelWorker):
    """Says the numbers from 1; a seed shifts them."""

    parameters: ClassVar[frozenset[str] | None] = frozenset({"temperature", "seed", "ignore_eos"})
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


async def test_an_answer_with_echo_goes_on_at_the_character_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its reader has: half of the prompt, half of a piece, all."""
    sampling = SamplingParams(echo=True, max_new_tokens=5, seed=0)
    whole = "one two" + "1 2 3 4 5 "
    async with bare_worker(monkeypatch, Counting()) as worker:
        cases = [(0, 0), (0, 3), (1, 9), (3, 13), (3, 12), (5, len(whole))]
        for number, (tokens, characters) in enumerate(cases):
            request = GenerateRequest(
                prompt="one two",
                sampling=sampling,
                resume_token_ids=list(range(1, tokens + 1)),
                resume_characters=characters,
            )
            worker.say(dispatch(number, request, model="counting", resume_from=tokens))
            end, outcome = await worker.end_of(number)
            assert (end.code, worker.text(number)) == (0, whole[characters:])
            assert outcome.usage == Usage(2, 5)
            made = [token for chunk in worker.chunks if chunk.request == number for token in chunk.token_ids]
            assert made == list(range(tokens + 1, 6))


async def test_every_delta_of_an_answer_with_echo_but_the_last_has_its_token() -> None:
    """An answer is continued only where its units are its tokens."""
    async with zfabric.testing.serving(Counting()) as client:
        deltas = [delta async for delta in client.stream("counting", "one two", echo=True, max_new_tokens=3)]
    assert deltas[0].text.startswith("one two")
    assert all(delta.token_ids for delta in deltas if delta.finish_reason is None)


class Untold(Counting):
    """Says nothing of parameters."""

    parameters = None

    async def complete(self, prompt: str, request: GenerateRequest) -> AsyncIterator[str]:
        yield f"{request.sampling.top_k}"


async def test_parameters_of_text_from_text_are_named_as_everywhere() -> None:
    async with zfabric.testing.serving(Untold()) as client:
        assert (await client.generate("counting", "x", top_k=5)).text == "5"
        with pytest.raises(UnsupportedParameterError, match="tools"):
            await client.chat("counting", [{"role": "user", "content": "x"}], tools=[{"type": "function"}])
    async with zfabric.testing.serving(Counting()) as client:
        with pytest.raises(UnsupportedParameterError, match="top_k"):
            await client.generate("counting", "x", top_k=5)


def test_the_text_of_a_message_is_its_texts() -> None:
    parts = [{"type": "text", "text": "one"}, "two", {"type": "text", "text": None}, {"type": "other"}]
    assert text_of({"role": "user", "content": parts}) == "one\ntwo"
    assert text_of({"role": "user"}) == ""


def test_the_parts_for_authors_are_documented_and_import_no_engine() -> None:
    code = "import sys, zfabric.backends.front as f; print(*sys.modules); assert f.Detokenizer"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm"} & {name.partition(".")[0] for name in found.stdout.split()}
    for name in front.__all__:
        assert f"`{name}`" in PAGE, name
        assert getattr(front, name).__doc__, name


async def test_the_page_s_backend_keeps_every_promise() -> None:
    """What docs/backends.md shows is what its reader copies."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Parrot" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    (report,) = await zfabric.testing.conformance(names["Parrot"]())
    assert sum(finding.kept is True for finding in report.findings) >= 14, str(report)


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
