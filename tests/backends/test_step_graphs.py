"""Steps over buffers that never move: of every size they answer as the ordinary pass, and nothing in them is of the host."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from msgspec import structs
from transformers import AutoConfig, AutoModelForCausalLM

from tests.backends.test_architectures import FAMILIES, SIZES, save
from tests.backends.test_engine import Start, greedy, starting
from tests.backends.test_lora import adapters
from tests.backends.test_paged import HISTORY
from tests.backends.tiny import ask, reference
from zfabric.backends.hf_transformers.cache.attention import install
from zfabric.backends.hf_transformers.cache.block_table import BlockTables, table_of
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.capture_check import CaptureCheck
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.runner.step_graphs import StepGraphs, capture_of, plain, row_sizes, widths
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.setup import assembly
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.wire.payloads import GenerateRequest

__all__ = ["adapters"]  # a fixture
BLOCK, BLOCKS = 4, 96
NOBODY = Answer(GenerateRequest())


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "paged") as start_one:
        yield start_one


def runner_of(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PagedRunner:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    install(model)
    runner = PagedRunner(ModelRunner(model.eval()), BLOCKS, 256 if device == "cuda" else BLOCK)
    with torch.inference_mode():
        # Layers get their part of the pool when they first write.
        runner.forward([Part(NOBODY, [0], 1, table_of([runner.cache.scratch]), "last")])
    return runner


def played_by(worker: ModelWorker) -> list[int]:
    """Rows of each step that is played from now on."""
    assert worker._assembled is not None
    core = worker._assembled.engine._core
    assert isinstance(core, PagedCore)
    graphs = core._runner.graphs
    assert graphs is not None
    rows: list[int] = []
    forward = graphs.forward

    def noted(tokens: Any, *others: Any) -> Any:
        rows.append(len(tokens))
        return forward(tokens, *others)

    graphs.forward = noted  # type: ignore[assignment, method-assign]
    return rows


def step_of(tables: list[BlockTables], lengths: list[int], chance: random.Random) -> list[Part]:
    return [
        Part(NOBODY, [chance.randrange(3, 200)], length, its, "last")
        for its, length in zip(tables, lengths, strict=True)
    ]


def test_sizes_are_few_and_end_with_the_largest() -> None:
    assert row_sizes(1) == [1]
    assert row_sizes(3) == [1, 2, 3]
    assert row_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert row_sizes(256)[-3:] == [240, 248, 256]
    assert widths(5, by_tables=True) == [5]
    assert widths(1, by_tables=False) == [1]
    assert widths(5, by_tables=False) == [1, 4, 5]
    assert widths(500, by_tables=False) == [1, 4, 16]


def compared(directory: Path, device: str, dtype: torch.dtype) -> None:
    """Steps of rows that come, go, grow, change places and share blocks, windows included, computed both ways."""
    runner = runner_of(directory, device, dtype)
    capture = capture_of(torch.device(device)) or plain
    block, chance = runner.tokens, random.Random(0)
    runner.record(10, 6 * block, capture)
    graphs = runner.graphs
    assert graphs is not None
    assert {rows for rows, _ in graphs.sizes} == {1, 2, 4, 8, 10}
    tables = [table_of([90, 91] if row % 3 == 0 else []) for row in range(10)]
    lengths = [2 * block + 1 if row % 3 == 0 else 1 + row for row in range(10)]
    free = list(range(90))
    exact = 1e-4 if dtype == torch.float32 else 5e-2
    with torch.inference_mode():
        for number in range(24):
            count = 1 + number % 10
            order = chance.sample(range(10), count) if number % 4 == 0 else list(range(count))
            for row in order:
                lengths[row] = min(lengths[row] + 1, 6 * block)
                while len(tables[row].blocks) * block < lengths[row]:
                    found = free.pop(chance.randrange(len(free)))
                    tables[row].each[0].extend(found, found + 1)
            parts = step_of([tables[row] for row in order], [lengths[row] for row in order], chance)
            runner.graphs = None
            expected = runner.forward(parts)
            runner.graphs = graphs
            # The newest tokens may be on the device alone.
            drawn = torch.tensor([part.tokens[0] for part in parts], device=device)
            given = [part._replace(tokens=[0]) for part in parts] if number % 3 else parts
            found = runner.forward(given, drawn if number % 3 else None)
            assert found.shape == expected.shape
            assert found.data_ptr() == graphs.buffer.data_ptr()
            torch.testing.assert_close(found, expected, atol=exact, rtol=exact)


@pytest.mark.parametrize("family", ["Qwen2Config", "MistralConfig", "Gemma3TextConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_each_size_answers_as_the_ordinary_pass(family: str, tmp_path: Path) -> None:
    compared(save(tmp_path, family, {**SIZES, **FAMILIES[family]}), "cpu", torch.float32)


@pytest.mark.parametrize("family", ["GPT2Config", "FalconConfig", "Qwen2Config", "Gemma3TextConfig", "MixtralConfig"])
def test_nothing_of_a_step_is_of_the_host(family: str, tmp_path: Path) -> None:
    """On a device that computes shapes alone, where each tensor of the host and each value asked for shows."""
    runner = runner_of(save(tmp_path, family, {**SIZES, **FAMILIES[family]}), "meta", torch.bfloat16)
    with torch.inference_mode():
        graphs = StepGraphs(runner.model, runner.cache, rows_max=2, length_max=BLOCK, capture=plain)
        graphs.record()
    assert graphs.sizes == [(1, 1), (2, 1)]


async def test_whatever_joins_and_leaves_each_text_is_its_own(
    start: Start, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "capture_of", lambda device: plain)
    chance = random.Random(0)
    worker, answers = await start(kv_tokens_max=288, max_batch_size=6, prefill_chunk_tokens=24)
    assert worker._models()[0].details["step_graphs"] == 8
    played = played_by(worker)
    wanted: dict[str, tuple[str, int]] = {}
    for number in range(12):
        text = chance.choice(["", HISTORY[:20], HISTORY[:48], HISTORY]) + "abcdefgh"[number % 8] * chance.randrange(
            1, 60
        )
        wanted[f"{number}"] = (text, chance.randrange(1, 40))
        worker.begin(greedy(f"{number}", *wanted[f"{number}"]))
        if chance.random() < 0.4:
            await answers.until(chance.choice(list(wanted)), tokens=1)
    await answers.until(*wanted)
    assert not answers.errors
    for name, (text, count) in wanted.items():
        assert answers.tokens(name) == reference(tiny_llama, text, count)
    assert len(played) > 20
    assert worker.load_report().gauges["prefix_cache_hits"] > 0


async def test_adapters_are_computed_as_ever(
    start: Start, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    texts = []
    for capture in (None, plain):
        monkeypatch.setattr(assembly, "capture_of", lambda device, capture=capture: capture)
        name, path = next(iter(adapters.items()))
        worker, answers = await start(lora=(f"{name}={path}",))
        played = played_by(worker) if capture else []
        for number, model in enumerate(("", name)):
            worker.begin(structs.replace(ask(f"{number}", HISTORY, **asked), model=model))
            await answers.until(f"{number}")
        assert len(played) in (0, 11)
        texts.append([answers.tokens("0"), answers.tokens("1")])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


async def test_a_model_that_cannot_be_recorded_goes_on_without(
    start: Start, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more.")

    monkeypatch.setattr(assembly, "capture_of", lambda device: refuse)
    worker, answers = await start()
    assert answers.logged == ["step_graphs_refused"]
    assert worker._assembled is not None
    assert worker._assembled.graphs == "OutOfMemoryError: CUDA out of memory."
    assert "step_graphs" not in worker._models()[0].details
    worker.begin(greedy("text", HISTORY, 12))
    await answers.until("text")
    assert answers.tokens("text") == reference(tiny_llama, HISTORY, 12)


async def test_steps_are_launched_from_python_if_that_is_asked_for(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "capture_of", lambda device: plain)
    worker, _ = await start(enforce_eager=True)
    assert "step_graphs" not in worker._models()[0].details


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_plays_what_the_ordinary_pass_computes(dtype: str, tmp_path: Path) -> None:
    compared(save(tmp_path, "MistralConfig", {**SIZES, **FAMILIES["MistralConfig"]}), "cuda", getattr(torch, dtype))


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: bool(x.any()), "waits for the device"),
        (lambda x: x.nonzero(), "nonzero waits"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: x.masked_select(x > 0), "masked_select waits"),
        (lambda x: x.repeat_interleave(x), "repeat_interleave waits"),
        (lambda x: torch.tensor([1, 2]), "values of the host"),
        (lambda x: x.unique(), "waits for the device"),
    ],
)
def test_what_would_break_a_recording_is_named(breaks: Callable[[torch.Tensor], Any], said: str) -> None:
    with pytest.raises(NotImplementedError, match=said), CaptureCheck(torch.device("cpu")):
        breaks(torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize(
    "breaks", [lambda x: torch.arange(3), lambda x: torch.ones(3).to(x), lambda x: x.copy_(torch.ones(3))]
)
def test_tensors_of_the_host_are_named_where_it_is_not_the_device(breaks: Callable[[torch.Tensor], Any]) -> None:
    given = torch.ones(3, device="meta")
    with pytest.raises(NotImplementedError, match="tensor on cpu"), CaptureCheck(torch.device("meta")):
        breaks(given)
    with CaptureCheck(torch.device("meta")):
        (given * 2 + torch.tensor(1.0)).sum()
