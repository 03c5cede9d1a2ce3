"""The hf-api backend against vLLM's own OpenAI server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.backends.faulty import Announced
from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.errors import BackendError, ContextOverflowError, RequestError, UnsupportedOperationError
from zfabric.wire.payloads import CountRequest, Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="package")

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class Setup:
    """A worker of `models_file`, and the server behind it."""

    worker: HuggingfaceApiWorker
    url: str

    async def ask(self, model: str = "plain", prompt: str = "Hello there", **more: Any) -> list[Delta]:
        """All deltas of one answer. Fields of a request go there, all else is sampling."""
        fields = {key: more.pop(key) for key in list(more) if key in GenerateRequest.__struct_fields__}
        given = fields if "messages" in fields or "prompt_token_ids" in fields else {**fields, "prompt": prompt}
        request = GenerateRequest(model=model, sampling=SamplingParams(**more), **given)
        request.validate()
        return [delta async for delta in self.worker.generate(request)]

    async def direct(self, path: str, **body: Any) -> dict[str, Any]:
        """What the server says to anybody."""
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            answer: dict[str, Any] = (await client.post(f"{self.url}/v1/{path}", json={"model": "tiny", **body})).json()
        return answer

    async def running(self) -> float:
        """Requests that the server's engine runs."""
        async with httpx2.AsyncClient(trust_env=False) as client:
            figures = (await client.get(f"{self.url}/metrics")).text
        return sum(float(value) for value in re.findall(r"^vllm:num_requests_running{.*} (\S+)$", figures, re.M))


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def setup(openai_server: str, models_file: Path) -> AsyncIterator[Setup]:
    worker = HuggingfaceApiWorker(HuggingfaceApiOptions(models=models_file))
    worker.steps = Announced()
    await worker.load()
    yield Setup(worker, openai_server)
    await worker.close()


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def tokens_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


async def test_completions_are_what_the_server_says(setup: Setup) -> None:
    told = await setup.direct(
        "completions", prompt="Hello there", temperature=0, ignore_eos=True, max_tokens=40, return_token_ids=True
    )
    deltas = await setup.ask(max_new_tokens=40, **GREEDY)
    assert text_of(deltas) == told["choices"][0]["text"]
    assert tokens_of(deltas) == told["choices"][0]["token_ids"]
    assert deltas[-1].finish_reason == "length"
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.estimated) == (11, 40, False)


async def test_chats_are_what_the_server_says(setup: Setup) -> None:
    told = await setup.direct("chat/completions", messages=HI, temperature=0, max_tokens=30, return_token_ids=True)
    for model in ("chat", "openai"):
        deltas = await setup.ask(model, messages=HI, temperature=0.0, max_new_tokens=30)
        assert text_of(deltas) == told["choices"][0]["message"]["content"]
        assert tokens_of(deltas) == (told["choices"][0]["token_ids"] if model == "chat" else [])
        usage = deltas[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == told["usage"]["prompt_tokens"]
        assert usage.prompt_tokens == await setup.worker.count_tokens(CountRequest(messages=HI, model=model))
    # The template of the tokenizer is the server's: completions of messages are the same answer.
    deltas = await setup.ask("plain", messages=HI, temperature=0.0, max_new_tokens=30)
    assert tokens_of(deltas) == told["choices"][0]["token_ids"]


@pytest.mark.parametrize("model", ["plain", "chat"])
async def test_logprobs_of_each_token(setup: Setup, model: str) -> None:
    deltas = await setup.ask(model, max_new_tokens=12, logprobs=3, **GREEDY)
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert [entry.token.token_id for entry in entries] == tokens_of(deltas)
    for entry in entries:
        assert entry.token == entry.top[0]
        assert len({other.token_id for other in entry.top}) == 3
        assert entry.top == sorted(entry.top, key=lambda other: -other.logprob)


async def test_ends(setup: Setup) -> None:
    free = await setup.ask(max_new_tokens=40, **GREEDY)
    text, tokens = text_of(free), tokens_of(free)
    stop = next(text[at : at + 3] for at in range(8, len(text)) if text[at : at + 3].isascii())
    for model in ("plain", "chat"):
        free = await setup.ask(model, max_new_tokens=40, **GREEDY)
        deltas = await setup.ask(model, max_new_tokens=40, stop=(stop, "never"), **GREEDY)
        assert text_of(deltas) == text_of(free).partition(stop)[0]
        assert (deltas[-1].finish_reason == "stop") == (stop in text_of(free))
    deltas = await setup.ask(max_new_tokens=40, stop_token_ids=(tokens[9],), min_new_tokens=5, **GREEDY)
    assert deltas[-1].finish_reason == "stop"
    assert text.startswith(text_of(deltas))
    assert len(tokens_of(deltas)) < 40
    deltas = await setup.ask(max_new_tokens=None, **GREEDY)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.total_tokens == 512
    # The context ends it, as it does everywhere: this is no error.
    deltas = await setup.ask(prompt="x" * 500, max_new_tokens=100, **GREEDY)
    assert (len(tokens_of(deltas)), deltas[-1].finish_reason) == (12, "length")


async def test_choices_and_seeds(setup: Setup) -> None:
    runs = [await setup.ask(max_new_tokens=8, n=2, seed=5, ignore_eos=True) for _ in range(2)]
    first, second = ([tokens_of(deltas, index) for index in (0, 1)] for deltas in runs)
    assert first == second
    assert first[0] != first[1]
    assert [len(tokens) for tokens in first] == [8, 8]
    usage = runs[0][-1].usage
    assert usage is not None
    assert usage.completion_tokens == 16


async def test_guides_and_formats(setup: Setup) -> None:
    for model in ("plain", "chat"):
        deltas = await setup.ask(model, max_new_tokens=40, guided_regex="[ab]{7}", temperature=1.0, seed=1)
        assert re.fullmatch("[ab]{7}", text_of(deltas))
        deltas = await setup.ask(model, max_new_tokens=40, guided_choice=("yes", "no"), temperature=0.0)
        assert text_of(deltas) in ("yes", "no")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bias = dict.fromkeys((4, 5, 198, 199, 200, 201, 202, 203, 204, 205, 223), -100.0)
    deltas = await setup.ask(
        "chat", messages=HI, response_format=wanted, max_new_tokens=100, temperature=0.0, logit_bias=bias
    )
    assert set(json.loads(text_of(deltas))) == {"a"}
    with pytest.raises(UnsupportedOperationError, match="response_format"):
        await setup.ask("plain", response_format=wanted)


async def test_a_tool_call_is_a_call(setup: Setup) -> None:
    guide = re.escape('<tool_call>\n{"name": "f", "arguments": {"a": true}}\n</tool_call>')
    guide = guide.replace("\\\n", "\n").replace("\\ ", " ")
    deltas = await setup.ask("chat", messages=HI, tools=[TOOL], guided_regex=guide, max_new_tokens=100, temperature=0.0)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [call.name for call in calls if call.name] == ["f"]
    assert json.loads("".join(call.arguments for call in calls)) == {"a": True}
    assert deltas[-1].finish_reason == "tool_calls"


async def test_refusals_are_typed(setup: Setup) -> None:
    for model in ("plain", "chat"):
        with pytest.raises(ContextOverflowError):
            await setup.ask(model, "x" * 600, max_new_tokens=4)
    with pytest.raises(RequestError, match="100000"):
        await setup.ask(prompt_token_ids=[1, 100_000])
    with pytest.raises(UnsupportedOperationError):
        await setup.ask("chat", prompt_token_ids=[1, 2])


@pytest.mark.parametrize("model", ["plain", "chat"])
async def test_a_cancel_reaches_the_engine(setup: Setup, model: str) -> None:
    async with asyncio.timeout(20):
        reading = asyncio.create_task(setup.ask(model, max_new_tokens=450, **GREEDY))
        while await setup.running() == 0:
            assert not reading.done()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        while await setup.running() > 0:
            await asyncio.sleep(0.01)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("chat", {}),
    ("plain", {"temperature": 1.0, "seed": 7}),
    ("plain", {"frequency_penalty": 0.7, "bad_words": ("z",)}),
    ("plain", {"guided_regex": "([ab]é)*"}),
    ("plain", {"stop": ("not to be found", "\ufffd\ufffd\ufffd\ufffd\ufffd")}),
]


@pytest.mark.parametrize(("model", "sampling"), CASES)
async def test_an_answer_goes_on_from_any_token(setup: Setup, model: str, sampling: dict[str, Any]) -> None:
    """Wherever its reader stands, also within a character, what comes is the rest, and usage is that of the whole."""
    sampling = {**GREEDY, "max_new_tokens": 24, **sampling}
    whole, tokens = "", list[int]()
    places: dict[int, str] = {}
    async with asyncio.timeout(60):
        # The server puts tokens together where its reader is slow: then it is asked once more.
        while len(places) < 4:
            deltas = [delta for delta in await setup.ask(model, **sampling) if delta.token_ids]
            whole, tokens = text_of(deltas), tokens_of(deltas)
            ends = range(1, len(deltas), 3)
            places |= {len(tokens_of(deltas[:end])): text_of(deltas[:end]) for end in ends}
    for count, shown in places.items():
        seen = tokens[:count]
        rest = await setup.ask(model, resume_token_ids=seen, resume_characters=len(shown), **sampling)
        assert shown + text_of(rest) == whole
        assert seen + tokens_of(rest) == tokens
        assert rest[-1].finish_reason is not None
        usage = rest[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(tokens)


async def test_an_answer_of_which_only_the_end_got_lost(setup: Setup) -> None:
    sampling = {**GREEDY, "max_new_tokens": 24}
    deltas = await setup.ask(**sampling)
    whole, tokens = text_of(deltas), tokens_of(deltas)
    rest = await setup.ask(resume_token_ids=tokens, resume_characters=len(whole) - 2, **sampling)
    assert (text_of(rest), tokens_of(rest), rest[-1].finish_reason) == (whole[-2:], [], "length")
    sampling |= {"stop_token_ids": (tokens[-1],), "max_new_tokens": 30}
    rest = await setup.ask(resume_token_ids=tokens, resume_characters=0, **sampling)
    assert (tokens_of(rest), rest[-1].finish_reason) == ([], "stop")
    assert whole.startswith(text_of(rest))


async def test_an_answer_that_cannot_go_on_says_so(setup: Setup) -> None:
    with pytest.raises(BackendError, match="differs after 0 tokens"):
        await setup.ask("chat", resume_token_ids=[5, 5], resume_characters=2, max_new_tokens=9, **GREEDY)
    with pytest.raises(UnsupportedOperationError, match="begun elsewhere"):
        await setup.ask("openai", resume_token_ids=[5, 5], resume_characters=2)
