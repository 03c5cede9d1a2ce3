"""Tool calls and reasoning through VLLMWorker: the same as through ModelWorker, and as vLLM's own parsers have it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.backends.calling import check_forced, check_resumed, check_worker, save_calling
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
    await check_forced(calling)
