"""Tool calls and reasoning through ModelWorker, by a model that writes what it is to write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tokenizers import AddedToken

from tests.backends.calling import (
    answered,
    ask_with_tools,
    check_forced,
    check_resumed,
    check_whole,
    check_worker,
    save_calling,
)  # fmt: skip
from tests.backends.tiny import Answers, fallback_tokenizer
from zfabric.backends.front.detokenizer import Detokenizer
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker

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
    await check_forced(served)


async def test_a_mark_comes_after_the_character_before_it() -> None:
    """Also where a character of several byte tokens is held back until a token ends it."""
    tokenizer = fallback_tokenizer()
    tokenizer.add_tokens([AddedToken("<mark>", special=True), AddedToken("<other>", special=True)])
    mark, other = tokenizer.convert_tokens_to_ids(["<mark>", "<other>"])
    smile = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    tokens = [*tokenizer("hello", add_special_tokens=False)["input_ids"], *smile, mark, other, *smile]
    detokenizer = Detokenizer(tokenizer, marks={mark: "<mark>"})
    text = "".join([detokenizer.add(token) for token in tokens]) + detokenizer.finish()
    assert text == "hello🙂<mark>🙂"
