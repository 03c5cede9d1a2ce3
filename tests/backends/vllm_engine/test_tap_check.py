"""An installed vLLM with other internals is noticed at the start, and served by its public API with the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.tiny import Answers, ask, reference
from tests.backends.vllm_engine.conftest import Served, run
from zfabric.backends.vllm_engine.compat import one_by_one, tap_check
from zfabric.backends.vllm_engine.compat.one_by_one import OneByOne
from zfabric.backends.vllm_engine.compat.step_tap import REPLACED, StepTap
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import ContextOverflowError, RequestError

pytestmark = pytest.mark.asyncio(loop_scope="package")

Patch = pytest.MonkeyPatch


def engine_of(worker: VLLMWorker) -> Any:
    return worker._served().engine


@pytest_asyncio.fixture(loop_scope="package")
async def bare(served: Served) -> AsyncIterator[Served]:
    """The engine as vLLM made it; afterwards with the tap again."""
    worker, _ = served
    tap = worker._outputs
    assert isinstance(tap, StepTap)
    tap.remove()
    yield served
    assert not set(REPLACED) & set(vars(engine_of(worker).output_processor))
    worker._outputs = StepTap(engine_of(worker), worker._on_step, worker._on_death)


def other_parameters(engine: Any, patch: Patch) -> None:
    patch.setattr(type(engine.output_processor), "process_outputs", lambda self, outputs: outputs)


def no_method(engine: Any, patch: Patch) -> None:
    patch.delattr(type(engine.output_processor), "update_scheduler_stats")


def no_processor(engine: Any, patch: Patch) -> None:
    patch.delattr(engine, "output_processor")


def no_attribute(engine: Any, patch: Patch) -> None:
    patch.delattr(engine.output_processor, "tracing_enabled")


def no_request_field(engine: Any, patch: Patch) -> None:
    patch.setattr("vllm.v1.engine.EngineCoreRequest", type("Request", (), {"__annotations__": {"request_id": str}}))


def no_output_field(engine: Any, patch: Patch) -> None:
    kind = type("Output", (), {"__annotations__": {}})
    patch.setattr("vllm.v1.engine.output_processor.OutputProcessorOutput", kind)


def refused(engine: Any, patch: Patch) -> None:
    def add_request(self: Any, request: Any, prompt: Any, parent_req: Any, request_index: Any, queue: Any) -> None:
        raise TypeError("a queue is needed")

    patch.setattr(type(engine.output_processor), "add_request", add_request)


def unheard(engine: Any, patch: Patch) -> None:
    kind = type(engine.output_processor)
    process = kind.process_outputs

    def process_outputs(
        self: Any, engine_core_outputs: Any, engine_core_timestamp: Any, iteration_stats: Any, **more: Any
    ) -> Any:
        processed = process(self, engine_core_outputs, engine_core_timestamp, iteration_stats, **more)
        processed.request_outputs = []
        return processed

    patch.setattr(kind, "process_outputs", process_outputs)


def no_offset(engine: Any, patch: Patch) -> None:
    patch.setattr(tap_check, "_TEXT", ("update", "_offset_of_another_name"))


BREAKAGES: list[tuple[Callable[[Any, Patch], None], str]] = [
    (other_parameters, r"parameters of OutputProcessor.process_outputs are outputs, not engine_core_outputs"),
    (no_method, "OutputProcessor has no method update_scheduler_stats"),
    (no_processor, "AsyncLLM has no output_processor"),
    (no_attribute, "OutputProcessor has no tracing_enabled"),
    (no_request_field, "EngineCoreRequest has no external_req_id"),
    (no_output_field, "OutputProcessorOutput has no request_outputs"),
    (refused, "a request cannot be added: TypeError: a queue is needed"),
    (unheard, "0 tokens came of 2"),
    (no_offset, "the detokenizer has no _offset_of_another_name"),
]


@pytest.mark.parametrize(("breaks", "reason"), BREAKAGES, ids=[breaks.__name__ for breaks, _ in BREAKAGES])
async def test_what_is_broken_is_named(bare: Served, breaks: Any, reason: str) -> None:
    worker, _ = bare
    engine = engine_of(worker)
    with pytest.MonkeyPatch.context() as patch:
        breaks(engine, patch)
        outputs = await tap_check.open_outputs(
            engine, worker._on_step, worker._on_failure, worker._on_death, generates=True
        )
    assert isinstance(outputs, OneByOne)
    assert reason in outputs.lacking
    await outputs.close()
    # As it is installed, nothing is broken.
    whole = await tap_check.open_outputs(
        engine, worker._on_step, worker._on_failure, worker._on_death, generates=True
    )  # fmt: skip
    assert isinstance(whole, StepTap)
    whole.remove()


async def test_the_public_api_serves_with_the_same_answers(bare: Served, vllm_llama: Path) -> None:
    worker, answers = bare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tap_check, "_METHODS", {"no_such_method": ()})
        await worker._connect(worker._served())
    assert answers.logged == ["step_tap_off"]
    [model] = worker._models()
    assert model.details["step_tap_off"] == "OutputProcessor has no method no_such_method"
    try:
        await _serves(bare, vllm_llama)
    finally:
        await worker._outputs.close()


async def _serves(served: Served, vllm_llama: Path) -> None:
    worker, answers = served
    prompts = {f"r{index}": "Hello " * (index + 1) for index in range(6)}
    await run(
        served,
        *(ask(name, prompt, temperature=0, max_new_tokens=20, ignore_eos=True) for name, prompt in prompts.items()),
    )
    for name, prompt in prompts.items():
        assert answers.tokens(name) == reference(vllm_llama, prompt, 20)
    tokens, text = answers.tokens("r0"), answers.text("r0")
    begun = sum(len(delta.text) for delta in answers.deltas["r0"][:7])
    again = ask(
        "again", prompts["r0"], temperature=0, max_new_tokens=20, ignore_eos=True, resume_token_ids=tokens[:7],
        resume_characters=begun,
    )  # fmt: skip
    await run(served, again, ask("long", "x" * 5_000), ask("odd", stop_token_ids=(10**9,), max_new_tokens=2))
    assert (answers.tokens("again"), answers.text("again")) == (tokens[7:], text[begun:])
    assert isinstance(answers.errors["long"], ContextOverflowError)
    assert answers.ended("odd")
    worker.begin(ask("dropped", temperature=0, max_new_tokens=400, ignore_eos=True))
    await answers.until("dropped", tokens=3)
    worker.abort("dropped")
    await run(served, ask("refused", max_new_tokens=2, logprobs=1_000))
    assert isinstance(answers.errors["refused"], RequestError)
    while engine_of(worker).get_num_unfinished_requests():
        await asyncio.sleep(0)


async def test_a_dead_engine_is_noticed_without_a_request(bare: Served, monkeypatch: Patch) -> None:
    worker, _ = bare
    died: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def check_health() -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(one_by_one, "_HEALTH_INTERVAL_S", 0.0)
    monkeypatch.setattr(engine_of(worker), "check_health", check_health)
    outputs = OneByOne(engine_of(worker), Answers().emit, worker._on_failure, died.set_result, "as a test has it")
    assert str(await died) == "gone"
    await outputs.close()
