"""What OpenAI's API refuses or takes at the edges of lengths, where the fabric by itself does not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import BadRequestError

from tests.gateway.backends import Recorder
from tests.gateway.conftest import gateway
from zfabric import BaseModelWorker, CountRequest, Delta, GenerateRequest, Logprob, ModelInfo, TokenLogprobs, Usage
from zfabric.wire.sampling import ALL_PARAMETERS
from zfabric.wire.tasks import DetokenizeRequest

CONTEXT = 2_000


class Counted(BaseModelWorker):
    """A word is a token; the prompt has scores, and every answer is one word."""

    parameters = ALL_PARAMETERS

    async def load(self) -> ModelInfo:
        return ModelInfo(
            name="counted", aliases=["other/name"], capabilities=["generate", "chat", "count_tokens", "detokenize"],
            context_length=CONTEXT,
        )  # fmt: skip

    async def count_tokens(self, request: CountRequest) -> int:
        return len(request.plain_text().split())

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return "".join(f"<{token}>" for token in request.token_ids)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        tokens = len(request.prompt_token_ids or request.plain_text().split())
        told = None
        if request.sampling.prompt_logprobs is not None:
            told = [None, *(TokenLogprobs(Logprob(number, -0.5, f"<{number}>")) for number in range(2, tokens + 1))]
        for index in range(request.sampling.n):
            last = index == request.sampling.n - 1
            yield Delta(
                text=" new", token_ids=[7], index=index, finish_reason="stop", prompt_logprobs=None if index else told,
                usage=Usage(tokens, request.sampling.n) if last else None,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "length", "fits"),
    [
        (5, 100, True),
        (5, 1_995, True),
        (5, 1_996, False),
        (1_000, 1_000, True),
        (1_001, 1_000, False),
        (1, 99_999, False),
    ],
)
async def test_a_prompt_and_its_length_have_to_fit_the_context(words: int, length: int, fits: bool) -> None:
    text = "w " * words
    async with gateway(Counted()) as served:
        asked: list[Any] = [
            served.openai.completions.create(model="other/name", prompt=text, max_tokens=length),
            served.openai.completions.create(model="counted", prompt=[1] * words, max_tokens=length),
            served.openai.chat.completions.create(
                model="counted", messages=[{"role": "user", "content": text}], max_completion_tokens=length
            ),
        ]
        for one in asked:
            if fits:
                await one
                continue
            with pytest.raises(BadRequestError) as refused:
                await one
            assert refused.value.code == "context_length_exceeded"
            assert f"maximum context length is {CONTEXT} tokens" in str(refused.value)


async def test_what_a_model_cannot_count_is_refused_by_its_length_alone() -> None:
    recorder = Recorder()
    async with gateway(recorder) as served:
        await served.openai.completions.create(model="recorder", prompt="a b", max_tokens=63)
        with pytest.raises(BadRequestError):
            await served.openai.completions.create(model="recorder", prompt="a b", max_tokens=64)
        await served.openai.completions.create(
            model="recorder", prompt="a b", max_tokens=64, extra_body={"truncate_prompt": True}
        )
    assert [request.sampling.max_new_tokens for request in recorder.requests] == [63, 64]


async def test_four_stops_are_taken_and_five_refused() -> None:
    async with gateway(Counted()) as served:
        chats, olds = served.openai.chat.completions, served.openai.completions
        messages: Any = [{"role": "user", "content": "a"}]
        await chats.create(model="counted", messages=messages, stop=list("abcd"))
        await olds.create(model="counted", prompt="a", stop=list("abcd"))
        for one in (
            chats.create(model="counted", messages=messages, stop=list("abcde")),
            olds.create(model="counted", prompt="a", stop=list("abcde")),
        ):
            with pytest.raises(BadRequestError) as refused:
                await one
            assert refused.value.param == "stop"


@pytest.mark.parametrize(("prompt", "text"), [("one two three", "one two three"), ([1, 2, 3], "<1><2><3>")])
async def test_a_prompt_is_given_back_without_a_new_token(prompt: Any, text: str) -> None:
    asked: dict[str, Any] = {"model": "counted", "prompt": prompt, "echo": True, "max_tokens": 0}
    async with gateway(Counted()) as served:
        whole = await served.openai.completions.create(**asked, n=2)
        scored = await served.openai.completions.create(**asked, logprobs=1)
        counted = {"include_usage": True}
        events = [
            event
            async for event in await served.openai.completions.create(**asked, stream=True, stream_options=counted)  # type: ignore[call-overload]
        ]
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (0, text, "length"), (1, text, "length"),
    ]  # fmt: skip
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 0)
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    first, last = events
    assert (first.choices[0].text, first.choices[0].finish_reason) == (text, "length")
    assert (last.choices, last.usage.completion_tokens) == ([], 0)


async def test_nothing_is_cut_from_a_prompt_that_is_given_back() -> None:
    async with gateway(Counted()) as served:
        with pytest.raises(BadRequestError) as refused:
            await served.openai.completions.create(
                model="counted", prompt="a", echo=True, max_tokens=0, extra_body={"truncate_prompt": True}
            )
    assert refused.value.param == "truncate_prompt"
