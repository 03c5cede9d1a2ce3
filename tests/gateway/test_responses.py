"""/v1/responses, as OpenAI's client sees it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.gateway.backends import Broken, Caller, Recorder
from tests.gateway.conftest import gateway
from zfabric.backends.echo import EchoWorker

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object"},
        "strict": False,
        "description": "Of a city",
    }
]


async def test_a_whole_response() -> None:
    async with gateway(EchoWorker(), Recorder()) as served:
        response = await served.openai.responses.create(model="echo", input="one two", max_output_tokens=2)
        assert (response.output_text, response.status, response.object) == ("one two ", "incomplete", "response")
        assert response.id.startswith("resp_")
        assert (response.metadata, response.tools, response.tool_choice) == ({}, [], "auto")
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (2, 2, 4)
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
        ended = await served.openai.responses.create(model="recorder", input="x", metadata={"a": "b"})
        assert (ended.status, ended.output_text, ended.metadata) == ("completed", "grün", {"a": "b"})
        assert ended.output[0].status == "completed"  # type: ignore[union-attr]


async def test_the_blocking_client_and_a_stream() -> None:
    async with gateway(EchoWorker()) as served:

        def read() -> tuple[str, str]:
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
                whole = client.responses.create(model="echo", input="a b").output_text
                with client.responses.stream(model="echo", input="a b", max_output_tokens=3) as stream:
                    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
                return whole, text

        assert await asyncio.to_thread(read) == ("a b ", "a b a ")


async def test_events_come_in_openais_order_with_numbers() -> None:
    async with gateway(Caller()) as served:
        stream = await served.openai.responses.create(model="caller", input="go", tools=TOOLS, stream=True)
        events: list[Any] = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    item, part = "response.output_item", "response.content_part"
    reasoning, text, call = "response.reasoning_text", "response.output_text", "response.function_call_arguments"
    # What an engine makes in one step comes as one delta.
    assert [kind for kind, _ in itertools.groupby(event.type for event in events)] == [
        "response.created", "response.in_progress",
        f"{item}.added", f"{part}.added", f"{reasoning}.delta", f"{reasoning}.done", f"{part}.done",
        f"{item}.done",
        f"{item}.added", f"{part}.added", f"{text}.delta", f"{text}.done", f"{part}.done", f"{item}.done",
        f"{item}.added", f"{call}.delta", f"{call}.done", f"{item}.done",
        f"{item}.added", f"{call}.delta", f"{call}.done", f"{item}.done",
        "response.completed",
    ]  # fmt: skip
    last = events[-1]
    done = [event.item for event in events if event.type == f"{item}.done"]
    assert last.response.output == done
    assert last.response.status == "completed"
    assert last.response.usage.input_tokens_details.cached_tokens == 4


async def test_calls_and_reasoning_whole_and_sent_back() -> None:
    caller = Caller()
    recorder = Recorder()
    async with gateway(caller, recorder) as served:
        create = served.openai.responses.create
        response = await create(model="caller", input="go", tools=TOOLS, include=["reasoning.encrypted_content"])
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        assert response.output_text == "Let me look."
        _, _, first, _ = response.output
        assert first.type == "function_call"
        assert (first.call_id, first.name, first.arguments) == ("call_1", "weather", '{"city": "Oslo"}')
        back: list[Any] = [
            {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
            *(item.model_dump(exclude_none=True) for item in response.output),
            {"type": "function_call_output", "call_id": "call_1", "output": "cold"},
            {"role": "developer", "content": "Be brief."},
        ]
        await create(model="recorder", input=back, instructions="You are kind.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    other = {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    assert recorder.requests[0].messages == [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "go"},
        {
            "role": "assistant", "content": "Let me look.", "reasoning_content": "hm, weather", "tool_calls": [call, other],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        {"role": "system", "content": "Be brief."},
    ]  # fmt: skip


async def test_fields_reach_the_backend() -> None:
    recorder = Recorder()
    picture = "data:image/png;base64,aGk="
    asked: list[Any] = [
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": "?"}],
        }
    ]
    async with gateway(recorder) as served:
        await served.openai.responses.create(
            model="recorder", input=asked, temperature=0.5, top_p=0.9, max_output_tokens=9, store=True, user="u",
            reasoning={"effort": "low"}, tools=TOOLS, truncation="disabled",
            text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
            extra_body={"top_k": 3, "seed": 7, "stop": ["x"]},
        )  # fmt: skip
        allowed: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "none"}]}
        await served.openai.responses.create(model="recorder", input="x", tools=TOOLS, tool_choice=allowed)
    first, second = recorder.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 3, 7)
    assert (sampling.max_new_tokens, sampling.stop) == (9, ("x",))
    assert first.chat is not None
    assert first.chat.chat_template_kwargs == {"reasoning_effort": "low"}
    assert first.messages is not None
    assert first.messages[0]["content"][0] == {"type": "image_url", "image_url": {"url": picture}}
    function = {"name": "weather", "parameters": {"type": "object"}, "strict": False, "description": "Of a city"}
    assert first.tools == [{"type": "function", "function": function}]
    assert first.response_format == {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    assert not second.tools


async def test_a_class_of_pydantic_is_the_schema_and_the_answer() -> None:
    class Pair(BaseModel):
        a: int

    async with gateway(Recorder(text='{"a": 3}')) as served:
        parsed = await served.openai.responses.parse(model="recorder", input="x", text_format=Pair)
        assert parsed.output_parsed == Pair(a=3)
        async with served.openai.responses.stream(model="recorder", input="x", text_format=Pair) as stream:
            assert (await stream.get_final_response()).output_parsed == Pair(a=3)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(stream: bool) -> None:
    async with gateway(Recorder()) as served:
        options: Any = {
            "model": "recorder",
            "input": "x",
            "top_logprobs": 1,
            "include": ["message.output_text.logprobs"],
        }
        if stream:
            events = [event async for event in await served.openai.responses.create(**options, stream=True)]
            deltas = [event for event in events if event.type == "response.output_text.delta"]
            assert [entry.token for delta in deltas for entry in delta.logprobs][:2] == ["gr", "ün"]
            response: Any = events[-1].response
        else:
            response = await served.openai.responses.create(**options)
        entries = response.output[0].content[0].logprobs
        assert [entry.token for entry in entries] == ["gr", "ün", ""]
        assert [len(entry.top_logprobs) for entry in entries] == [1, 1, 0]


async def test_a_failure_after_the_first_word_is_an_event() -> None:
    async with gateway(Broken()) as served:
        stream = await served.openai.responses.create(model="broken", input="later", stream=True)
        last: Any = [event async for event in stream][-1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert (last.response.error.code, last.response.error.message) == ("server_error", "the engine failed")
        with pytest.raises(openai.InternalServerError):
            await served.openai.responses.create(model="broken", input="at once", stream=True)


#: A change of a good request, and what the refusal names.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"n": 2}, "n"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["web_search_call.results"]}, "include"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": ["f"]}}, "tool_choice.tools"),
    ({"tools": [{"type": "function", "parameters": {}}]}, "tools[0].name"),
    ({"input": [{"role": {"type": "user"}, "content": "x"}]}, "input[0]"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"role": "user", "content": "x", "name": "Al"}]}, "input[0].name"),
    (
        {"input": [{"type": "function_call", "name": "f", "arguments": "", "call_id": "c", "namespace": "n"}]},
        "input[0].namespace",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "tone": 3}]}]},
        "input[0].content[0].tone",
    ),
    (
        {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x", "tone": 3}]}]},
        "input[0].tone",
    ),
    ({"input": [{"type": "reasoning", "content": ["x"]}]}, "input[0]"),
    ({"input": [{"type": ["message"], "content": "x"}]}, "input[0]"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0]"),
    ({"frobnicate": 1}, "frobnicate"),
]


async def test_what_is_not_honoured_is_refused_by_name() -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        for change, parameter in REFUSED:
            refused = await web.post("/v1/responses", json={"model": "echo", "input": "x", **change})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, parameter), change
