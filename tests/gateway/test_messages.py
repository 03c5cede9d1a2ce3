"""/v1/messages, as Anthropic's client sees it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from pydantic import BaseModel

from tests.gateway.backends import Broken, Caller, Recorder, Slow
from tests.gateway.conftest import Served, gateway
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import NoWorkerError
from zfabric.gateway.fabric import FabricClient
from zfabric.gateway.keys import ApiKey, KeyTable

HELLO: list[Any] = [{"role": "user", "content": "one two three"}]
TOOLS: list[Any] = [{"name": "weather", "description": "Of a city", "input_schema": {"type": "object"}}]


@pytest_asyncio.fixture
async def recorder() -> Recorder:
    """Notes what it is asked."""
    return Recorder()


@pytest_asyncio.fixture
async def served(recorder: Recorder) -> AsyncIterator[Served]:
    """All backends behind one gateway."""
    async with gateway(EchoWorker(EchoOptions(context_length=16)), Caller(), Broken(), recorder) as made:
        yield made


@pytest_asyncio.fixture
async def anthropic_client(served: Served) -> AsyncIterator[AsyncAnthropic]:
    """Anthropic's own client, which tries nothing twice."""
    async with AsyncAnthropic(base_url=served.url, api_key="sk-test", max_retries=0) as client:
        yield client


async def test_a_whole_message(anthropic_client: AsyncAnthropic) -> None:
    message = await anthropic_client.messages.create(model="echo", max_tokens=4, messages=HELLO)
    assert [block.model_dump(include={"type", "text"}) for block in message.content] == [
        {"type": "text", "text": "one two three one "}
    ]
    assert (message.role, message.model, message.stop_reason) == ("assistant", "echo", "max_tokens")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 4)
    assert message.id.startswith("msg_")
    assert message._request_id == message.id.removeprefix("msg_")
    ended = await anthropic_client.messages.create(model="recorder", max_tokens=4, messages=HELLO)
    assert ended.stop_reason == "end_turn"


async def test_the_blocking_client_reads_a_stream(served: Served) -> None:
    def read() -> str:
        with (
            anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client,
            client.messages.stream(model="echo", max_tokens=5, messages=HELLO) as stream,
        ):
            return "".join(stream.text_stream)

    assert await asyncio.to_thread(read) == "one two three one two "


async def test_events_come_in_anthropics_order(anthropic_client: AsyncAnthropic) -> None:
    stream = await anthropic_client.messages.create(
        model="caller", max_tokens=50, messages=HELLO, tools=TOOLS, stream=True
    )
    events: list[Any] = [event async for event in stream]
    # The client keeps pings to itself, and what an engine makes in one step comes as one delta.
    assert [kind for kind, _ in itertools.groupby(event.type for event in events if event.type != "ping")] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 4,
        "message_delta", "message_stop",
    ]  # fmt: skip
    kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        "thinking_delta", "signature_delta", "text_delta", "input_json_delta",
    ]  # fmt: skip
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("tool_use", 8)
    assert (events[-2].usage.input_tokens, events[-2].usage.cache_read_input_tokens) == (5, 4)


async def test_the_clients_accumulator_gives_the_whole_message(anthropic_client: AsyncAnthropic) -> None:
    options: Any = {"model": "caller", "max_tokens": 50, "messages": HELLO, "tools": TOOLS}
    whole = await anthropic_client.messages.create(**options)
    async with anthropic_client.messages.stream(**options) as stream:
        built = await stream.get_final_message()
    for message in (whole, built):
        thinking, text, first, second = message.content
        assert (thinking.type, text.type, first.type, second.type) == ("thinking", "text", "tool_use", "tool_use")
        assert thinking.thinking == "hm, weather"  # type: ignore[union-attr]
        assert text.text == "Let me look."  # type: ignore[union-attr]
        assert (first.id, first.name, first.input) == ("call_1", "weather", {"city": "Oslo"})  # type: ignore[union-attr]
        assert second.input == {}  # type: ignore[union-attr]
        assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", 8)


async def test_blocks_reach_the_backend_as_a_chat(anthropic_client: AsyncAnthropic, recorder: Recorder) -> None:
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "See"}, image]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Well?"},
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "cold"}]},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ]
    await anthropic_client.messages.create(
        model="recorder", max_tokens=7, messages=messages, tools=TOOLS, stop_sequences=["x"],
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        thinking={"type": "enabled", "budget_tokens": 1_024}, metadata={"user_id": "u"}, service_tier="auto",
        extra_body={"temperature": 0.5, "top_k": 3},
    )  # fmt: skip
    [request] = recorder.requests
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    assert request.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "See"}, picture]},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "It is"},
    ]
    function = {"name": "weather", "parameters": {"type": "object"}, "description": "Of a city"}
    assert request.tools == [{"type": "function", "function": function}]
    assert request.chat is not None
    assert request.chat.continue_final_message
    assert request.chat.chat_template_kwargs == {"enable_thinking": True}
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.stop, sampling.temperature, sampling.top_k) == (7, ("x",), 0.5, 3)


async def test_a_class_of_pydantic_is_the_schema_and_the_answer() -> None:
    class Pair(BaseModel):
        a: int

    made = Recorder(text='{"a": 3}')
    async with (
        gateway(made) as served,
        AsyncAnthropic(base_url=served.url, api_key="x", max_retries=0) as anthropic_client,
    ):
        parsed = await anthropic_client.messages.parse(
            model="recorder", max_tokens=9, messages=HELLO, output_format=Pair
        )
        assert parsed.parsed_output == Pair(a=3)
    wanted = made.requests[0].response_format
    assert wanted is not None
    assert wanted["json_schema"]["schema"]["required"] == ["a"]


async def test_tokens_are_counted(anthropic_client: AsyncAnthropic) -> None:
    assert (await anthropic_client.messages.count_tokens(model="echo", messages=HELLO)).input_tokens == 3
    with pytest.raises(anthropic.BadRequestError, match="'temperature' is not a parameter of a count"):
        await anthropic_client.messages.count_tokens(model="echo", messages=HELLO, extra_body={"temperature": 1})


async def test_no_tools_where_none_are_to_be_called(anthropic_client: AsyncAnthropic) -> None:
    none: Any = {"type": "none"}
    message = await anthropic_client.messages.create(
        model="caller", max_tokens=9, messages=HELLO, tools=TOOLS, tool_choice=none
    )
    assert message.content[0].text == "no tools"  # type: ignore[union-attr]


async def test_errors_are_anthropics(anthropic_client: AsyncAnthropic) -> None:
    create = anthropic_client.messages.create
    with pytest.raises(anthropic.NotFoundError) as missing:
        await create(model="nobody", max_tokens=4, messages=HELLO)
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    assert body["request_id"] == missing.value.response.headers["request-id"]
    with pytest.raises(anthropic.InternalServerError) as broken:
        await create(model="broken", max_tokens=4, messages=HELLO)
    assert (broken.value.status_code, broken.value.type) == (500, "api_error")
    later: list[Any] = [{"role": "user", "content": "later"}]
    stream = await create(model="broken", max_tokens=4, messages=later, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the engine failed"):
        _ = [event async for event in stream]


async def test_nobody_there_is_an_overload(monkeypatch: pytest.MonkeyPatch, anthropic_client: AsyncAnthropic) -> None:
    def away(*_: Any) -> None:
        raise NoWorkerError("nobody serves it")

    monkeypatch.setattr(FabricClient, "stream", away)
    with pytest.raises(anthropic.InternalServerError) as told:
        await anthropic_client.messages.create(model="echo", max_tokens=4, messages=HELLO)
    assert (told.value.status_code, told.value.type) == (529, "overloaded_error")
    assert told.value.response.headers["retry-after"] == "1"


async def test_keys_of_both_kinds_are_taken() -> None:
    keys = KeyTable({"team": ApiKey(key="sk-1")})
    async with gateway(EchoWorker(), keys=keys) as served:
        for key, token in (("sk-1", None), (None, "sk-1")):
            async with AsyncAnthropic(
                base_url=served.url, api_key=key, auth_token=token, max_retries=0
            ) as anthropic_client:
                assert (await anthropic_client.messages.create(model="echo", max_tokens=1, messages=HELLO)).content
        async with AsyncAnthropic(base_url=served.url, api_key="wrong", max_retries=0) as anthropic_client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await anthropic_client.messages.create(model="echo", max_tokens=1, messages=HELLO)
            assert refused.value.type == "authentication_error"


async def test_a_caller_that_goes_away_stops_the_engine() -> None:
    slow = Slow()
    async with (
        gateway(slow) as served,
        AsyncAnthropic(base_url=served.url, api_key="x", max_retries=0) as anthropic_client,
    ):
        async with asyncio.timeout(10):
            async with anthropic_client.messages.stream(model="slow", max_tokens=9, messages=HELLO) as stream:
                await anext(aiter(stream.text_stream))
            await slow.stopped.wait()


#: A change of a good request, and what the refusal names.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stop": ["x"]}, "'stop' is not a parameter of a message, 'stop_sequences' is"),
    ({"container": "c"}, "'container' is not a parameter"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type is 'bash_20250124'"),
    ({"tools": [{"name": "x"}]}, "tools[0] must have a name and an input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice is given without tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        "messages[0].content[0] is of type 'document'",
    ),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a text"),
    ({"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "messages[0].name is not a parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "tone": 3}]}]},
        "messages[0].content[0].tone is not a parameter of 'text'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "cost": 1}]}]},
        "messages[0].content[0].cost",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x", "size": 1}}]}
            ]
        },
        "messages[0].content[0].source.size",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": "x"}]}]},
        "messages[0].content[0].source must be an object",
    ),
    ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "messages[0].content[0] is of type ['text']"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id must be a text"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type is 'xml'"),
    ({"max_tokens": None}, "max_tokens"),
]


async def test_what_is_not_honoured_is_refused_by_name(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url) as web:
        for change, told in REFUSED:
            asked = {"model": "echo", "max_tokens": 3, "messages": HELLO, **change}
            refused = await web.post("/v1/messages", json=asked)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), change
            assert told in refused.json()["error"]["message"]
