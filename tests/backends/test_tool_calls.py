"""Tool calls and reasoning through ModelWorker, by a model that writes what it is to write."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tokenizers import AddedToken

from tests.backends.calling import (
    ARGUMENTS,
    THOUGHT,
    USER,
    answered,
    ask_with_tools,
    check_forced,
    check_resumed,
    check_whole,
    check_worker,
    save_calling,
)  # fmt: skip
from tests.backends.tiny import Answers, fallback_tokenizer
from tests.fabric import fabric
from tests.parsing.outputs import TOOLS
from zfabric import AsyncClient
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


@pytest.mark.parametrize("read", [20, 100])
async def test_a_stream_with_calls_migrates_between_workers_without_a_trace(directory: Path, read: int) -> None:
    """The worker that serves is drained in a thought, in the text, or in a call; its reader sees nothing of it."""
    with tempfile.TemporaryDirectory(prefix="zf-") as place:
        async with fabric(f"ipc://{place}/c.sock") as made, AsyncClient(made.endpoint) as client:
            for name in ("w0", "w1"):
                options = TransformersOptions(model=str(directory), model_names=("m",), device="cpu", threads=1)
                await made.add_worker(name, ModelWorker(options))
            stream = client.stream("m", messages=[USER], tools=TOOLS, temperature=0, max_new_tokens=300)
            tokens = 0
            while tokens < read:
                tokens += len((await anext(stream)).token_ids)
            origin = stream.worker
            assert origin is not None
            service, task = made.services.pop(origin), made.tasks.pop(origin)
            await service.drain(1)
            await task
            whole = await stream
    assert stream.worker != origin
    assert (whole.reasoning, whole.text, whole.finish_reason) == (THOUGHT, "Yes.", "tool_calls")
    assert [(call.name, call.arguments) for call in whole.tool_calls] == [("get_weather", ARGUMENTS), ("now", "{}")]
    assert len({call.id for call in whole.tool_calls}) == 2
    assert whole.usage.completion_tokens == len(whole.choices[0].token_ids)
