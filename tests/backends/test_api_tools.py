"""Tool calls and reasoning of servers, with a fake one: what a caller needs for several turns comes whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends.faulty import EVENTS, answer, api_worker, ask, chat_event, faulty, usual, write_models
from zfabric import Delta
from zfabric.backends.hf_api.answers import AnswerReader
from zfabric.backends.hf_api.models_file import Upstream
from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.testing import serving
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.tool_calls import ToolCallDelta

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "1 + 1?"}


def event(finish: str | None = None, **delta: Any) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"
    )


def piece(name: str | None = None, arguments: str | None = None, **more: Any) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**more, "function": function}


def read(*events: list[dict[str, Any]]) -> list[ToolCallDelta]:
    """Calls as a reader of a whole answer has them."""
    reader = AnswerReader(Upstream(name="m", base_url="http://x"), GenerateRequest(prompt="x", request_id="1-2-0"))
    told = [json.dumps({"choices": [{"delta": {"tool_calls": pieces}}]}) for pieces in events]
    told.append('{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}')
    deltas = [delta for one in told for delta in reader.take(one.encode())] + reader.finish(None)
    assert deltas[-1].finish_reason == "tool_calls"
    return whole(deltas)


def whole(deltas: list[Delta]) -> list[ToolCallDelta]:
    calls: list[ToolCallDelta] = []
    for part in [part for delta in deltas for part in delta.tool_calls or ()]:
        if part.index == len(calls):
            assert part.id
            assert part.name
            calls.append(ToolCallDelta(index=part.index, id=part.id, name=part.name))
        else:
            assert part.id is part.name is None
        calls[part.index].arguments += part.arguments
    return calls


@pytest.mark.parametrize(
    "events",
    [
        # OpenAI and vLLM: the name at once, arguments bit by bit.
        [[piece("add", "", index=0, id="a")], [piece(None, '{"a"', index=0)], [piece(None, ": 1}", index=0)]],
        # The name with each piece, and the id too.
        [[piece("add", '{"a"', index=0, id="a")], [piece("add", ": 1}", index=0, id="a")]],
        # All at once, without an index.
        [[piece("add", '{"a": 1}', id="a")]],
        # A name in parts, and one that grows.
        [[piece("ad", index=0, id="a")], [piece("d", index=0)], [piece(None, '{"a": 1}', index=0)]],
        [[piece("ad", index=0, id="a")], [piece("add", index=0)], [piece(None, '{"a": 1}', index=0)]],
    ],
)
def test_a_call_is_one_call_however_the_server_cuts_it(events: list[list[dict[str, Any]]]) -> None:
    assert read(*events) == [ToolCallDelta(index=0, id="a", name="add", arguments='{"a": 1}')]


def test_several_calls_are_told_apart_by_place_or_by_id() -> None:
    by_place = read([piece("f", "{}", index=1, id="a")], [piece("g", "", index=2, id="b")])
    by_id = read([piece("f", "{}", index=0, id="a"), piece("g", "{}", index=0, id="b")])
    assert [(c.index, c.id, c.name) for c in by_place] == [(0, "a", "f"), (1, "b", "g")]
    assert [(c.index, c.id, c.name) for c in by_id] == [(0, "a", "f"), (1, "b", "g")]


def test_a_call_without_an_id_gets_one() -> None:
    (first,), (again,) = (read([piece("f", "{}")]) for _ in range(2))
    assert first.id == again.id
    assert first.id
    assert first.id.startswith("call_")


async def test_reasoning_is_told_and_counted(tmp_path: Path) -> None:
    for name in ("reasoning_content", "reasoning"):
        script = answer(EVENTS, event(**{name: "I th"}), event(**{name: "ink."}), event(content="2"), event("stop"))
        async with faulty(script) as server, api_worker(tmp_path, server.url) as worker:
            deltas = await ask(worker)
        assert "".join(delta.reasoning for delta in deltas) == "I think."
        assert "".join(delta.text for delta in deltas) == "2"
        assert deltas[-1].usage is not None
        assert (deltas[-1].usage.completion_tokens, deltas[-1].usage.estimated) == (3, True)


async def test_an_answer_with_calls_is_taken_up_in_the_next_turn(tmp_path: Path) -> None:
    calls = answer(
        EVENTS,
        event(reasoning_content="Add them."),
        event(tool_calls=[piece("add", "", index=0, id="x1")]),
        event(tool_calls=[piece(None, '{"a": 1, ', index=0)]),
        event(tool_calls=[piece(None, '"b": 1}', index=0)]),
        event("tool_calls"),
        b"data: [DONE]\n\n",
    )
    async with faulty(calls, usual("2")) as server:
        options = HuggingfaceApiOptions(models=write_models(tmp_path / "models.json", server.url))
        async with serving(HuggingfaceApiWorker(options)) as client:
            first = await client.chat("m", [USER], tools=[TOOL])
            assert (first.finish_reason, first.reasoning, first.text) == ("tool_calls", "Add them.", "")
            (call,) = first.tool_calls
            assert (call.id, call.name, json.loads(call.arguments)) == ("x1", "add", {"a": 1, "b": 1})
            result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
            second = await client.chat("m", [USER, first.message, result], tools=[TOOL])
            assert second.text == "2"
        sent = server.asked[-1].body["messages"]
        assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
        assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == "x1"


async def test_images_go_out_through_the_fabric(tmp_path: Path) -> None:
    async with faulty(answer(EVENTS, chat_event("seen"), chat_event(finish="stop"), b"data: [DONE]\n\n")) as server:
        options = HuggingfaceApiOptions(models=write_models(tmp_path / "models.json", server.url, multimodal=True))
        async with serving(HuggingfaceApiWorker(options)) as client:
            parts = [{"type": "text", "text": "What?"}, {"type": "image", "image": b"\x89PNG\r\n\x1a\nx"}]
            completion = await client.chat("m", [{"role": "user", "content": parts}])
        assert completion.text == "seen"
        assert (
            server.asked[0].body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        )


async def test_how_tools_are_called_is_passed_on(tmp_path: Path) -> None:
    chosen = {"type": "function", "function": {"name": "add"}}
    async with faulty(usual("2"), usual("2")) as server:
        options = HuggingfaceApiOptions(models=write_models(tmp_path / "models.json", server.url))
        async with serving(HuggingfaceApiWorker(options)) as client:
            await client.chat("m", [USER], tools=[TOOL], tool_choice=chosen, parallel_tool_calls=False)
            await client.chat("m", [USER], tools=[TOOL], tool_choice="none")
    forced, none = (one.body for one in server.asked)
    assert (forced["tool_choice"], forced["parallel_tool_calls"]) == (chosen, False)
    assert "add_generation_prompt" not in forced
    assert "tools" not in none
