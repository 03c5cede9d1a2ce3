"""Tool calls and reasoning through ModelWorker, by a model that writes what it is to write."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.backends.calling import (
    answered,
    ask_with_tools,
    check_resumed,
    check_whole,
    check_worker,
    save_calling,
)  # fmt: skip
from tests.backends.tiny import Answers
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import RequestError

Served = tuple[ModelWorker, Answers]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_calling(tmp_path_factory.mktemp("calling"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(directory: Path) -> AsyncIterator[Served]:
    worker, answers = (
        ModelWorker(TransformersOptions(model=str(directory), model_names=("m",), device="cpu")),
        Answers(),
    )
    (info,) = await worker.load()
    assert (info.details["tool_parser"], info.details["reasoning_parser"]) == ("hermes", "qwen3")
    assert {"tool_choice", "parallel_tool_calls"} <= set(info.parameters or ())
    worker.steps = answers
    yield worker, answers
    await worker.close()


async def test_text_reasoning_and_calls_are_told_apart(served: Served) -> None:
    await check_worker(served)


async def test_an_answer_goes_on_elsewhere_within_a_call_or_a_thought(served: Served) -> None:
    await check_resumed(served)
    await check_resumed(served, stop=("nothing of this",))


async def test_the_best_of_several_has_its_calls(served: Served) -> None:
    check_whole(await answered(served, ask_with_tools(best_of=2)))


async def test_calls_are_forced_by_a_guide(served: Served) -> None:
    seen = await answered(served, ask_with_tools(tool_choice="required", parallel_tool_calls=False))
    assert len(seen.calls) == 1
    assert seen.reason == "tool_calls"
    assert (seen.text, seen.reasoning) == ("", "")
    json.loads(seen.calls[0].arguments)
    chosen = {"type": "function", "function": {"name": "now"}}
    seen = await answered(served, ask_with_tools(tool_choice=chosen))
    assert [(call.name, json.loads(call.arguments), seen.reason) for call in seen.calls] == [("now", {}, "tool_calls")]
    with pytest.raises(RequestError, match="guided_regex"):
        await answered(served, ask_with_tools(tool_choice="required", guided_regex="a"))
