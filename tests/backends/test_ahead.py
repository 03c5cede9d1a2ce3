"""Steps that are begun before the host has read the one before: as on a device, forced on a CPU, and no answer is another one."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.backends.test_architectures import FAMILIES, save
from tests.backends.test_engine import Start, causal_model, greedy, hold, prepared, starting
from tests.backends.test_paged import HISTORY, watched
from tests.backends.test_speculation import all_answered, logprobs, requests, told
from tests.backends.test_weights import operate, steps
from tests.backends.tiny import Answers, _loaded, byte_tokenizer, reference
from zfabric.backends.hf_transformers.scheduling import engine
from zfabric.backends.hf_transformers.scheduling.ahead_core import AheadCore
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import OutOfMemoryError

__all__ = ["steps"]  # a fixture


@pytest_asyncio.fixture
async def start(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    monkeypatch.setattr(engine, "_AHEAD", {"cpu", "cuda"})
    async with starting(tiny_llama, "paged") as start_one:
        yield start_one


def ahead(worker: ModelWorker) -> int:
    assert worker._assembled is not None
    core = worker._assembled.engine._core
    assert isinstance(core, AheadCore)
    return core.steps_ahead


async def test_every_answer_is_what_it_is_when_each_step_waits(
    start: Start, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = byte_tokenizer().decode(reference(tiny_llama, HISTORY, 60)[21:24])
    # A row that the host has to move by each token holds all others back.
    asked = [one for one in requests(stop) if one.request_id != "guided"]
    monkeypatch.setattr(engine, "AheadCore", PagedCore)
    _, plain = await all_answered(start, requests(stop), kv_tokens_max=2_048)
    monkeypatch.undo()
    monkeypatch.setattr(engine, "_AHEAD", {"cpu"})
    for room, its in ((2_048, asked), (224, asked), (2_048, requests(stop))):
        worker, answers = await all_answered(start, its, kv_tokens_max=room)
        for one in its:
            assert told(answers, one.request_id) == told(plain, one.request_id), (room, one.request_id)
            assert logprobs(answers, one.request_id) == logprobs(plain, one.request_id), (room, one.request_id)
        gauges = worker.load_report().gauges
        assert gauges["kv_tokens_free"] == room
        assert (gauges["preemptions"] > 0) is (room < 2_048)
        assert ahead(worker) > 20


async def test_a_row_costs_one_step_more_than_it_has_tokens_if_it_ends_by_one(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start()
    passes = watched(worker)
    expected = reference(tiny_llama, HISTORY, 40)
    worker.begin(greedy("by length", HISTORY, 40))
    await answers.until("by length")
    assert answers.tokens("by length") == expected
    assert (len(passes), ahead(worker)) == (40, 38)
    passes.clear()
    last = expected.index(expected[20])
    worker.begin(greedy("by a token", HISTORY, 40, stop_token_ids=[expected[20]]))
    await answers.until("by a token")
    assert answers.tokens("by a token") == expected[: last + 1]
    assert len(passes) == last + 2


async def test_prompts_that_wait_for_their_turn_get_it_while_others_run(start: Start) -> None:
    worker, answers = await start(prefill_chunk_tokens=16, max_batch_size=7)
    worker.begin(greedy("runs", "x", 300))
    await answers.until("runs", tokens=5)
    gate = hold(worker)
    names = [f"one of many {number}" for number in range(9)]
    for name in names:
        worker.begin(greedy(name, name, 6))
    await prepared(worker)
    gate.set()
    await answers.until(*names)
    assert not answers.ended("runs")
    await answers.until("runs")
    assert worker.load_report().gauges["steps_ahead"] == ahead(worker) > 100


async def test_who_is_cancelled_leaves_the_others_as_they_are(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(kv_tokens_max=512)
    for name in ("goes", "stays"):
        worker.begin(greedy(name, HISTORY + name, 100))
    await answers.until("goes", "stays", tokens=5)
    worker.abort("goes")
    await answers.until("stays", tokens=20)
    worker.begin(greedy("goes", HISTORY, 20))
    await answers.until("goes", "stays")
    assert answers.tokens("stays") == reference(tiny_llama, HISTORY + "stays", 100)
    assert answers.tokens("goes")[-20:] == reference(tiny_llama, HISTORY, 20)
    assert worker.load_report().gauges["kv_tokens_free"] == 512


@pytest.mark.parametrize("mode", ["recompute", "keep", "abort"])
async def test_what_was_begun_with_former_weights_is_told_as_theirs(
    start: Start, tiny_llama: Path, steps: Path, mode: str
) -> None:
    worker, answers = await start(weights_dir=steps, weight_version="step-0")
    worker.begin(greedy("runs", HISTORY, 100))
    await answers.until("runs", tokens=10)
    await operate(worker, "reload_weights", path="step-1", weight_version="step-1", mode=mode)
    worker.begin(greedy("after", HISTORY, 30))
    await answers.until("after", "runs")
    assert answers.tokens("after") == reference(steps / "step-1", HISTORY, 30)
    last = answers.last("runs")
    assert last.extra is not None
    versions = last.extra["weight_versions"]
    count = versions[0]["end"]
    assert answers.tokens("runs")[:count] == reference(tiny_llama, HISTORY, count)
    assert len(versions) == (1 if mode == "abort" else 2)
    if mode == "recompute":
        tokenizer, model = _loaded(steps / "step-1")
        known = torch.tensor([[*tokenizer(HISTORY)["input_ids"], *answers.tokens("runs")[:count]]])
        rest = model.generate(known, max_new_tokens=100 - count, do_sample=False, eos_token_id=None, pad_token_id=2)
        assert answers.tokens("runs") == rest[0, len(HISTORY) :].tolist()


async def test_windows_that_slide_are_given_back_as_ever(start: Start, tmp_path: Path) -> None:
    directory = save(tmp_path, "MistralConfig", FAMILIES["MistralConfig"])
    worker, answers = await start(model=str(directory), kv_tokens_max=144, prefill_chunk_tokens=32)
    names = [letter * 60 for letter in "ab"]
    gate = hold(worker)
    for name in names:
        worker.begin(greedy(name, name, 70))
    await prepared(worker)
    gate.set()
    await answers.until(*names)
    for name in names:
        assert answers.tokens(name) == reference(directory, name, 70)
    assert worker.load_report().gauges["preemptions"] == 0
    assert ahead(worker) > 50


@pytest.mark.parametrize(
    ("error", "kind"), [(RuntimeError("broken"), None), (torch.OutOfMemoryError(), OutOfMemoryError)]
)
async def test_a_step_that_cannot_be_begun_costs_what_it_does_else(
    start: Start, tiny_llama: Path, error: Exception, kind: Any
) -> None:
    worker, answers = await start()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise error

    causal_model(worker).register_forward_pre_hook(fail)
    gate = hold(worker)
    for name in ("first", "second"):
        worker.begin(greedy(name, name, 30))
    await prepared(worker)
    gate.set()
    await answers.until("first", "second")
    if kind is None:
        assert set(answers.errors) == {"first", "second"}
    else:
        assert {name: type(one) for name, one in answers.errors.items()} == {"second": kind}
        assert answers.tokens("first") == reference(tiny_llama, "first", 30)
    # What was drawn before is not lost.
    assert answers.tokens("second") == reference(tiny_llama, "second", 11)
    worker.begin(greedy("next", HISTORY, 10))
    await answers.until("next")
    assert answers.tokens("next") == reference(tiny_llama, HISTORY, 10)
    assert worker.load_report().gauges["engine_restarts"] == (kind is None)


@pytest.mark.parametrize("failing", [None, "forward", "sample_async"])
async def test_penalties_count_what_the_host_has_not_read(
    start: Start, failing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a step that could not be begun, before it drew or after: what that had counted is counted anew."""
    names = ("first", "second", "third")
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}

    async def answered(worker: ModelWorker, answers: Answers) -> None:
        gate = hold(worker)
        for number, name in enumerate(names):
            worker.begin(greedy(name, name, 40 + number, **penalties))
        await prepared(worker)
        gate.set()
        await answers.until(*names)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "AheadCore", PagedCore)
        worker, plain = await start()
        await answered(worker, plain)
    worker, answers = await start()
    if failing is not None:
        fail_once(worker, failing, 12)
    await answered(worker, answers)
    assert set(answers.errors) == ({"third"} if failing else set())
    for name in names:
        expected = plain.tokens(name)
        assert len(set(expected)) > 10
        assert answers.tokens(name) == (expected[:11] if name in answers.errors else expected)
    assert ahead(worker) >= 38


def fail_once(worker: ModelWorker, name: str, number: int) -> None:
    """Have a step fail for want of memory, when it has computed what is named and the pass is that number."""
    assert worker._assembled is not None
    core: Any = worker._assembled.engine._core
    owner = core._runner if name == "forward" else core._sampler
    work, calls = getattr(owner, name), itertools.count(1)

    def failing(*given: Any) -> Any:
        made = work(*given)
        if next(calls) == number:
            raise torch.OutOfMemoryError
        return made

    setattr(owner, name, failing)


@pytest.mark.gpu
async def test_a_device_is_one_step_ahead(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(device="cuda", kv_tokens_max=4_096)
    for name in ("first", "second"):
        worker.begin(greedy(name, HISTORY + name, 60))
    await answers.until("first", "second")
    for name in ("first", "second"):
        assert answers.tokens(name) == reference(tiny_llama, HISTORY + name, 60)
    assert ahead(worker) > 40
