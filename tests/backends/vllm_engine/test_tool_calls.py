"""Tool calls and reasoning through VLLMWorker: the same as through ModelWorker, and as vLLM's own parsers have it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.calling import answered, ask_with_tools, check_resumed, check_worker, save_calling
from tests.backends.scripted import POSITIONS
from tests.backends.tiny import Answers
from tests.backends.vllm_engine.conftest import TINY, Served
from zfabric.backends.vllm_engine.worker import VLLMWorker

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def calling(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = save_calling(tmp_path_factory.mktemp("calling"))
    worker, answers = (
        VLLMWorker(["--model", str(directory), "--model-names", "m", *TINY, "--max-model-len", str(POSITIONS)]),
        Answers(),
    )
    (info,) = await worker.load()
    assert info.context_length == POSITIONS
    assert (info.details["tool_parser"], info.details["reasoning_parser"]) == ("hermes", "qwen3")
    assert {"tool_choice", "parallel_tool_calls"} <= set(info.parameters or ())
    worker.steps = answers
    yield worker, answers
    await worker.close()


async def test_text_reasoning_and_calls_are_told_apart(calling: Served) -> None:
    await check_worker(calling)


async def test_an_answer_goes_on_elsewhere_within_a_call_or_a_thought(calling: Served) -> None:
    await check_resumed(calling)
    # Drawn again from its start.
    await check_resumed(calling, presence_penalty=0.01)


async def test_calls_are_forced_by_a_guide(calling: Served) -> None:
    seen = await answered(calling, ask_with_tools(tool_choice="required", parallel_tool_calls=False))
    assert (len(seen.calls), seen.text, seen.reasoning, seen.reason) == (1, "", "", "tool_calls")
    json.loads(seen.calls[0].arguments)
    chosen = {"type": "function", "function": {"name": "now"}}
    seen = await answered(calling, ask_with_tools(tool_choice=chosen))
    assert [(call.name, json.loads(call.arguments), seen.reason) for call in seen.calls] == [("now", {}, "tool_calls")]
