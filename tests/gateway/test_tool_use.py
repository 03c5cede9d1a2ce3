"""Tool use over several turns by OpenAI's own client, with a model that makes its own text and parsers that read it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from tests.backends.calling import ANSWER, ARGUMENTS, RESULTS, THOUGHT, USER, save_calling
from tests.cli.test_commands import zfabric
from tests.gateway.conftest import Served, gateway
from tests.parsing.outputs import TOOLS
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker

ASKED: Any = {"model": "m", "tools": TOOLS, "temperature": 0}


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    model = save_calling(tmp_path / "model")
    async with gateway(ModelWorker(TransformersOptions(model=str(model), model_names=("m",), device="cpu"))) as found:
        yield found


async def test_calls_and_their_results_over_two_turns(served: Served) -> None:
    chat: list[Any] = [USER]
    async with served.openai.chat.completions.stream(messages=chat, **ASKED) as stream:
        first = await stream.get_final_completion()
    [choice] = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Yes.")
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", ARGUMENTS),
        ("now", "{}"),
    ]
    whole = await served.openai.chat.completions.create(messages=chat, **ASKED)
    message = whole.choices[0].message
    assert message.model_extra == {"reasoning_content": THOUGHT}
    again = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert again == [(call.function.name, call.function.arguments) for call in calls]
    results: list[Any] = [
        {"role": "tool", "tool_call_id": call.id, "content": content}
        for call, (_, content) in zip(message.tool_calls or (), RESULTS, strict=True)
    ]
    second = await served.openai.chat.completions.create(messages=[*chat, message, *results], **ASKED)
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == (ANSWER, "stop")


async def test_how_tools_are_called_is_the_callers_choice(served: Served) -> None:
    chosen: Any = {"type": "function", "function": {"name": "now"}}
    forced = await served.openai.chat.completions.create(messages=[USER], tool_choice=chosen, **ASKED)
    [call] = forced.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("now", "{}")
    one = await served.openai.chat.completions.create(messages=[USER], parallel_tool_calls=False, **ASKED)
    assert [call.function.name for call in one.choices[0].message.tool_calls or ()] == ["get_weather"]
    none = await served.openai.chat.completions.create(messages=[USER], tool_choice="none", max_tokens=8, **ASKED)
    assert not none.choices[0].message.tool_calls
    wrong: Any = {"type": "function", "function": {"name": "later"}}
    with pytest.raises(openai.BadRequestError) as refused:
        await served.openai.chat.completions.create(messages=[USER], tool_choice=wrong, **ASKED)
    assert refused.value.param == "tool_choice"


async def test_tools_that_may_not_be_called_are_not_shown_to_the_model(served: Served) -> None:
    count = served.fabric.count_tokens
    assert await count("m", messages=[USER], tools=TOOLS, tool_choice="none") == await count("m", messages=[USER])
    assert await count("m", messages=[USER], tools=TOOLS, tool_choice="required") > await count("m", messages=[USER])


async def test_operators_see_which_parsers_there_are(served: Served) -> None:
    code, output, errors = await zfabric(served.fabric.endpoint, "models", COLUMNS="400")
    assert code == 0, errors
    assert "tools=hermes, reasoning=qwen3" in output
