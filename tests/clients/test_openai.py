"""OpenAI's own SDK, on a real model and on each engine."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import MODEL, Served

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class City(BaseModel):
    """What an answer has to be."""

    name: Literal["Paris", "Rome"]
    big: bool


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)


def test_the_line_that_serve_prints_works(served: Served) -> None:
    """`zfabric serve MODEL --backend …`, for real."""
    words = shlex.split(served.said[1].removeprefix("try: "))
    done = subprocess.run([words[0], "--silent", *words[1:]], capture_output=True, text=True, check=True)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_a_chat_whole_and_as_a_stream(served: Served) -> None:
    with client(served) as sdk:
        assert [model.id for model in sdk.models.list()] == [MODEL]
        options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_completion_tokens": 24, "temperature": 0}
        answer = sdk.chat.completions.create(**options)
        said = answer.choices[0].message.content
        assert said is not None
        assert "Paris" in said
        with sdk.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
        assert chunks[-1].usage == answer.usage
        # The helper that gathers a stream as it comes.
        with sdk.chat.completions.stream(**options) as events:
            assert events.get_final_completion().choices[0].message.content == said


async def test_many_streams_of_the_asynchronous_client_at_once(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120) as sdk:

        async def read(number: int) -> str:
            stream = await sdk.completions.create(
                model=MODEL, prompt=f"{number}, ", max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(read(number) for number in range(8)))
        assert all(texts)
        # A stream that is left is cancelled, and the connection goes on.
        stream = await sdk.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=500, stream=True)
        async for _ in stream:
            break
        await stream.close()
        assert len(await read(0)) > 0


def test_structured_outputs_are_objects(served: Served) -> None:
    with client(served) as sdk:
        parsed = sdk.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=City, max_completion_tokens=60, temperature=0
        )
        assert isinstance(parsed.choices[0].message.parsed, City)
        with sdk.chat.completions.stream(
            model=MODEL, messages=QUESTION, response_format=City, max_completion_tokens=60, temperature=0
        ) as events:
            assert events.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


def test_tools_and_their_results_are_taken(served: Served) -> None:
    """The model is too small to call one by itself, and its template shows none; what is asked for has to be understood."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    talk = [*QUESTION, {"role": "assistant", "tool_calls": [call]}]
    talk.append({"role": "tool", "tool_call_id": "call_1", "content": "Sunny."})
    with client(served) as sdk:
        for messages in (QUESTION, talk):
            answer = sdk.chat.completions.create(
                model=MODEL, messages=messages, tools=WEATHER, max_completion_tokens=8, temperature=0
            )
            choice = answer.choices[0]
            assert choice.finish_reason in ("stop", "length", "tool_calls")
            assert choice.message.content or choice.message.tool_calls


def test_errors_are_the_sdks_own(served: Served) -> None:
    with client(served) as sdk:
        with pytest.raises(openai.NotFoundError) as missing:
            sdk.chat.completions.create(model="nobody", messages=QUESTION)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            sdk.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 20_000}])
        assert long.value.code == "context_length_exceeded"


def test_vectors_say_what_is_alike(minilm: Served) -> None:
    with client(minilm) as sdk:
        told = sdk.embeddings.create(model="minilm", input=["a cat", "a kitten", "quarterly revenue"])
        cat, kitten, revenue = (row.embedding for row in told.data)
        dot = [sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, revenue)]
        assert dot[0] > dot[1] + 0.3
        floats = sdk.embeddings.create(model="minilm", input="a cat", encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(cat, abs=1e-6)
        assert told.usage.prompt_tokens > 6
