"""The engine under pressure: a full cache, failures at every place, names used again, and what it reports of itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.backends.tiny import Answers, ask, reference
from zfabric.backends.hf_transformers.cache.kv_cache import KVCacheLayer
from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.scheduling import engine
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import (
    BackendError,
    EngineStalledError,
    OutOfMemoryError,
    ParameterRangeError,
    RequestError,
    WorkerLostError,
)
from zfabric.wire.tasks import EmbedRequest

Served = tuple[ModelWorker, Answers]
Start = Callable[..., Awaitable[Served]]
PROMPTS = ["Hello", "The quick brown fox jumps over", "a", "Once upon a time"]


@asynccontextmanager
async def starting(model: Path, kv_cache: str) -> AsyncIterator[Start]:
    """Starts workers on a model with one kind of cache, or with options of the test's own, and ends them."""
    workers: list[ModelWorker] = []

    async def start_one(**options: Any) -> Served:
        chosen = {"model": str(model), "kv_cache": kv_cache, "dtype": "float32", "device": "cpu", **options}
        worker = ModelWorker(TransformersOptions(**chosen))
        workers.append(worker)
        worker.steps = answers = Answers()
        await worker.load()
        return worker, answers

    yield start_one
    for worker in workers:
        await worker.close()


@pytest_asyncio.fixture(params=["paged", "padded"])
async def start(tiny_llama: Path, request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    async with starting(tiny_llama, request.param) as start_one:
        yield start_one


def hold(worker: ModelWorker) -> threading.Event:
    """Keeps the engine's thread busy until the event is set, so that requests gather."""
    begun, gate = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait()

    assert worker._assembled is not None
    worker._assembled.engine.run_job(wait)
    begun.wait()
    return gate


def shape(tokens: torch.Tensor) -> tuple[int, int]:
    """Rows of the pass under way, and tokens of the longest, by what the model or a layer is given."""
    cache = current()
    if cache is None:
        return tokens.shape[0], tokens.shape[1]
    assert cache.passed is not None
    return len(cache.passed.counts), max(cache.passed.counts)


def causal_model(worker: ModelWorker) -> Any:
    assert worker._assembled is not None
    return worker._assembled.loaded.model


async def prepared(worker: ModelWorker) -> None:
    """Wait until The input processor has done all that it was given."""
    assert worker._assembled is not None
    await asyncio.wrap_future(worker._assembled.engine._preparing.submit(lambda: None))


def greedy(name: str, prompt: str, count: int, **sampling: Any) -> Any:
    return ask(name, prompt, temperature=0, max_new_tokens=count, ignore_eos=True, **sampling)


async def together(worker: ModelWorker, answers: Answers, prompts: Sequence[str], count: int) -> None:
    """Greedy answers to prompts that come before the first of them is computed, by their prompts."""
    gate = hold(worker)
    for prompt in prompts:
        worker.begin(greedy(prompt, prompt, count))
    await prepared(worker)
    gate.set()
    await answers.until(*prompts)


def rows_of_passes(worker: ModelWorker) -> list[int]:
    """Of those to come, one after the other."""
    passes: list[int] = []
    causal_model(worker).register_forward_pre_hook(
        lambda _, __, given: passes.append(shape(given["input_ids"])[0]), with_kwargs=True
    )
    return passes


async def test_prompts_that_come_together_are_computed_together(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start()
    passes = rows_of_passes(worker)
    await together(worker, answers, PROMPTS, 8)
    assert passes == [4] * 8
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == reference(tiny_llama, prompt, 8)


@pytest.mark.parametrize("patience_s", [60.0, 0.005])
async def test_the_first_turn_waits_a_little_for_who_is_being_prepared(
    start: Start, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    worker, answers = await start()
    passes = rows_of_passes(worker)
    assert worker._assembled is not None
    its = worker._assembled.engine
    prepare, seen = its._input_processor.sequences, threading.Event()

    def slowly(answer: Any) -> Any:
        if answer.request.request_id == "second":
            seen.wait(0.1 if patience_s > 1 else None)
        return prepare(answer)

    monkeypatch.setattr(engine, "_GATHER_S", patience_s)
    monkeypatch.setattr(its._input_processor, "sequences", slowly)
    # The one whose preparation takes long is known of before the other is ready, where that one is to wait for it.
    for name in ("second", "first") if patience_s > 1 else ("first", "second"):
        worker.begin(greedy(name, name, 8))
    if patience_s < 1:
        # Whose preparation takes long holds nobody up.
        await answers.until("first")
    seen.set()
    await answers.until("first", "second")
    assert passes == ([2] * 8 if patience_s > 1 else [1] * 16)


async def test_the_first_turn_waits_a_share_of_a_turn_for_who_comes_next(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has come and is prepared does not run alone if another comes meanwhile; nor does it wait longer than its share."""
    worker, answers = await start()
    passes = rows_of_passes(worker)
    assert worker._assembled is not None
    its = worker._assembled.engine
    monkeypatch.setattr(engine, "_GATHER_S", 60.0)
    for latest_s, share in ((60.0, 1.0), (0.001, 0.04)):
        passes.clear()
        monkeypatch.setattr(engine, "_NEXT_SHARE", share)
        its._step_ns = int(latest_s * 1e9)
        worker.begin(greedy("first", "first", 8))
        await prepared(worker)
        if latest_s < 1:
            await answers.until("first")
        worker.begin(greedy("second", "second", 8))
        if latest_s > 1:
            await prepared(worker)
            # It would wait for a third, too.
            its.run_job(lambda: None)
        await answers.until("first", "second")
        assert passes == ([2] * 8 if latest_s > 1 else [1] * 16)
        answers.deltas.clear()


async def test_a_full_cache_makes_the_youngest_wait_and_changes_no_text(start: Start, tiny_llama: Path) -> None:
    limit = 144
    worker, answers = await start(kv_tokens_max=limit)
    cells: list[int] = []
    prompts: list[int] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        rows, columns = shape(given["input_ids"])
        prompts.extend([rows] * (columns > 1))
        cache = current()
        if cache is None:
            cells.append(rows * (given["past_key_values"].get_seq_length() + 1))
        else:
            assert cache.passed is not None
            cells.append(sum(cache.passed.lengths))

    causal_model(worker).register_forward_pre_hook(note, with_kwargs=True)
    names = [f"{number} {prompt}" for number, prompt in enumerate(PROMPTS)]
    for name in names:
        worker.begin(greedy(name, name, 60))
    await answers.until(*names)
    assert answers.largest_step > 1
    assert max(cells) <= limit
    # A row that gave its place back was computed again.
    assert sum(prompts) > len(names)
    gauges = worker.load_report().gauges
    assert gauges["preemptions"] > 0
    assert (gauges["running"], gauges["waiting"], gauges["kv_cache_use"], gauges["kv_tokens_free"]) == (0, 0, 0, limit)
    assert gauges["steps"] > 60
    assert gauges["step_ms"] > 0
    for name in names:
        assert answers.tokens(name) == reference(tiny_llama, name, 60)
        usage = answers.last(name).usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(name), 60)
    assert worker.load_report().kv_blocks_free == limit


async def test_seeded_text_survives_giving_its_place_back(start: Start) -> None:
    texts = []
    for limit in (130, 10_000):
        worker, answers = await start(kv_tokens_max=limit)
        for seed in range(3):
            worker.begin(ask(f"s{seed}", seed=seed, max_new_tokens=50, ignore_eos=True, repetition_penalty=1.2))
        await answers.until("s0", "s1", "s2")
        texts.append([answers.tokens(f"s{seed}") for seed in range(3)])
    assert texts[0] == texts[1]


async def test_more_choices_than_places_take_turns(start: Start) -> None:
    results = []
    for size in (2, 8):
        worker, answers = await start(max_batch_size=size)
        worker.begin(ask("n", n=5, seed=1, max_new_tokens=6, ignore_eos=True, prompt_logprobs=0))
        await answers.until("n")
        results.append([answers.tokens("n", index) for index in range(5)])
        assert sum(delta.prompt_logprobs is not None for delta in answers.deltas["n"]) == 1
        usage = answers.last("n").usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len("Hello there"), 30)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("stop_token_ids", {"stop_token_ids": (100_000,), "min_new_tokens": 2}),
        ("logit_bias", {"logit_bias": {100_000: 1.0}}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
    ],
)
async def test_tokens_that_the_model_lacks_are_refused_by_name(
    tiny_worker: Served, name: str, sampling: dict[str, Any]
) -> None:
    worker, answers = tiny_worker
    worker.begin(ask("bad", **sampling))
    worker.begin(greedy("good", "Hello", 3))
    await answers.until("bad", "good")
    error = answers.errors["bad"]
    assert isinstance(error, ParameterRangeError)
    assert error.details["parameter"] == name
    assert len(answers.tokens("good")) == 3


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_k": 5}, {"n": 3}, {"logprobs": 2}, {"best_of": 2}])
async def test_a_row_whose_tokens_are_all_banned_is_an_error_and_no_token(
    tiny_worker: Served, more: dict[str, Any]
) -> None:
    worker, answers = tiny_worker
    everything = dict.fromkeys(range(259), float("-inf"))
    worker.begin(greedy("good", "Hello", 8))
    worker.begin(ask("bad", **{"temperature": 0.0, "logit_bias": everything, **more}))
    await answers.until("good", "bad")
    assert isinstance(answers.errors["bad"], RequestError)
    assert "all are banned" in str(answers.errors["bad"])
    assert not answers.tokens("bad")
    assert len(answers.tokens("good")) == 8


async def test_a_stop_string_does_not_end_what_may_not_end_yet(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    worker.begin(greedy("whole", "Hello", 30))
    await answers.until("whole")
    text = answers.text("whole")
    stops = tuple(dict.fromkeys(text))
    for least in (0, 1, 7, 30):
        worker.begin(greedy(f"{least}", "Hello", 30, stop=stops, min_new_tokens=least))
        await answers.until(f"{least}")
        tokens = answers.tokens(f"{least}")
        # Every character is a stop string; bytes that make none yet do not end it.
        assert least < len(tokens) or least == 30
        assert text.startswith(answers.text(f"{least}"))
        assert answers.last(f"{least}").finish_reason == ("stop" if least < 30 else "length")


async def test_prompt_logprobs_of_a_long_prompt_come_in_one_piece(start: Start) -> None:
    worker, answers = await start(prefill_chunk_tokens=32)
    worker.begin(greedy("a", "x" * 300, 2, prompt_logprobs=2, echo=True))
    await answers.until("a")
    first, *others = answers.deltas["a"]
    assert len(first.prompt_logprobs or ()) == 300
    assert all(delta.prompt_logprobs is None for delta in others)
    assert first.text.startswith("x" * 300)
    assert first.token_ids


async def test_progress_is_seen_while_a_prompt_is_computed(start: Start) -> None:
    worker, answers = await start(prefill_chunk_tokens=16)
    before = worker.load_report().progress or 0
    worker.begin(greedy("a", "x" * 400, 1))
    await answers.until("a")
    assert (worker.load_report().progress or 0) - before >= 400 // 16


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def failing(worker: ModelWorker, error: Exception, when: Callable[[int, int], bool], *, times: int = 1) -> None:
    """Has the last layer fail in passes of such rows and columns, when the first layers have grown already."""
    left = [times]

    def fail(_: Any, arguments: tuple[Any, ...]) -> None:
        rows, columns = shape(arguments[0])
        if left[0] and when(rows, columns):
            left[0] -= 1
            raise error

    causal_model(worker).model.layers[-1].register_forward_pre_hook(fail)


async def test_memory_that_runs_out_in_a_step_costs_the_youngest(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    failing(
        worker, torch.OutOfMemoryError("CUDA out of memory. Tried"), lambda rows, columns: (rows, columns) == (2, 1)
    )
    there = threading.Event()
    steps: list[int] = []

    def wait(_: Any, arguments: tuple[Any, ...]) -> None:
        steps.append(shape(arguments[0])[0])
        if len(steps) > 10:
            there.wait(60)

    causal_model(worker).model.layers[0].register_forward_pre_hook(wait)
    worker.begin(greedy("old", "Hello", 300))
    await answers.until("old", tokens=2)
    # Its prompt is so short that all of it goes along in one pass: two rows of a token each are a step.
    worker.begin(greedy("young", "Hi you", 30))
    await prepared(worker)
    there.set()
    await answers.until("old", "young")
    assert isinstance(answers.errors["young"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny_llama, "Hello", 300)
    worker.begin(greedy("next", "Hi you", 5))
    await answers.until("next")
    assert answers.tokens("next") == reference(tiny_llama, "Hi you", 5)


async def test_memory_that_runs_out_for_a_prompt_costs_that_request(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    # Among others, and alone.
    memory = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    worker.begin(greedy("old", "Hello", 30))
    await answers.until("old", tokens=2)
    # However short the parts are that its prompt is computed in.
    failing(worker, memory, lambda rows, columns: columns > 1, times=2)
    worker.begin(greedy("large", "x" * 100, 30))
    await answers.until("old", "large")
    assert isinstance(answers.errors["large"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny_llama, "Hello", 30)


async def test_memory_that_runs_out_while_joining_leaves_the_batch_whole(
    start: Start, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = await start(kv_cache="padded")
    merge, calls = KVCacheLayer.merge, []

    def merge_once(layer: KVCacheLayer, other: KVCacheLayer) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        merge(layer, other)

    monkeypatch.setattr(KVCacheLayer, "merge", merge_once)
    worker.begin(greedy("old", "Hello", 30))
    await answers.until("old", tokens=2)
    worker.begin(greedy("young", "A much longer prompt, so that the batch would become wider", 30))
    await answers.until("old", "young")
    assert isinstance(answers.errors["young"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny_llama, "Hello", 30)


async def test_a_prompt_that_fails_among_others_fails_alone(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    failing(worker, ValueError("odd"), lambda rows, columns: columns == 9, times=2)
    gate = hold(worker)
    for name, prompt in (("a", "Hello"), ("odd", "nine char"), ("b", "Hi")):
        worker.begin(greedy(name, prompt, 6))
    await prepared(worker)
    gate.set()
    await answers.until("a", "odd", "b")
    assert type(answers.errors["odd"]) is BackendError
    assert answers.tokens("a") == reference(tiny_llama, "Hello", 6)
    assert answers.tokens("b") == reference(tiny_llama, "Hi", 6)


async def test_a_turn_that_breaks_costs_what_it_computed_and_no_more(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(max_batch_size=2)
    failing(worker, ValueError("broken"), lambda rows, columns: (rows, columns) == (2, 1))
    gate = hold(worker)
    worker.begin(greedy("a", "Hello", 30))
    worker.begin(greedy("b", "Hello you", 30))
    worker.begin(greedy("waits", "Once", 30))
    await prepared(worker)
    gate.set()
    await answers.until("a", "b", "waits")
    # Lost, not failed: the fabric goes on with them elsewhere.
    for name in ("a", "b"):
        assert isinstance(answers.errors[name], WorkerLostError)
        assert "broken" in str(answers.errors[name])
    assert answers.tokens("waits") == reference(tiny_llama, "Once", 30)
    worker.begin(greedy("a", "Hello", 30, resume_token_ids=answers.tokens("a")))
    answers.errors.clear()
    await answers.until("a")
    assert answers.tokens("a") == reference(tiny_llama, "Hello", 30)
    assert answers.logged == ["engine_restarted"]
    report = worker.load_report()
    assert report.gauges["engine_restarts"] == 1
    assert report.waiting == 0
    assert report.kv_blocks_free == worker._assembled.loaded.kv_tokens_max  # type: ignore[union-attr]


async def test_an_engine_that_breaks_again_and_again_is_dead(start: Start) -> None:
    worker, answers = await start()
    failing(worker, ValueError("broken"), lambda rows, columns: (rows, columns) == (2, 1), times=100)
    for attempt in range(4):
        assert answers.died is None
        gate = hold(worker)
        for name in ("a", "b"):
            worker.begin(greedy(f"{name}{attempt}", "Hello", 30))
        await prepared(worker)
        gate.set()
        if attempt < 3:
            await answers.until(f"a{attempt}", f"b{attempt}")
    await answers.death()
    assert answers.logged == ["engine_restarted"] * 3
    assert "broken" in str(answers.died)


async def test_a_broken_model_is_known_and_leaves_nobody_waiting(start: Start) -> None:
    worker, answers = await start()
    failing(worker, ValueError("broken"), lambda rows, columns: columns == 1, times=100)
    worker.begin(greedy("a", "Hello", 30))
    await answers.death()
    assert "broken" in str(answers.died)
    with pytest.raises(BackendError):
        await worker.embed(EmbedRequest(inputs=["a"]))


async def test_prompts_that_all_fail_are_the_engines_fault(start: Start) -> None:
    worker, answers = await start()
    failing(worker, ValueError("broken"), lambda rows, columns: columns > 1, times=100)
    for number in range(5):
        worker.begin(greedy(f"r{number}", f"Hello {number}" + "x" * number * 20, 5))
    await answers.death()
    assert "broken" in str(answers.died)


# ── cancelling ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_name_may_be_used_again_at_once(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    worker.begin(greedy("a", "Hello", 300))
    await answers.until("a", tokens=3)
    worker.abort("a")
    answers.deltas.clear()
    worker.begin(greedy("a", "The other", 12))
    await answers.until("a")
    assert answers.tokens("a") == reference(tiny_llama, "The other", 12)


async def test_what_waits_and_what_is_being_computed_can_be_cancelled(start: Start) -> None:
    worker, answers = await start(prefill_chunk_tokens=16, max_batch_size=1)
    gate = hold(worker)
    for name in ("a", "b", "c"):
        worker.begin(greedy(name, name * 100, 5))
    await prepared(worker)
    assert worker.load_report().waiting == 3
    worker.abort("a")
    worker.abort("b")
    worker.abort("unknown")
    gate.set()
    await answers.until("c")
    assert set(answers.deltas) == {"c"}
    assert worker.load_report().waiting == 0
    assert worker.load_report().gauges["kv_tokens_free"] > 0


async def test_the_batch_loses_a_cancelled_row_at_the_next_step(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    rows: list[int] = []
    worker.begin(greedy("a", "Hello", 400))
    worker.begin(greedy("b", "Hello", 400))
    await answers.until("a", "b", tokens=3)
    gate = hold(worker)
    worker.abort("a")
    causal_model(worker).register_forward_pre_hook(
        lambda _, __, given: rows.append(shape(given["input_ids"])[0]), with_kwargs=True
    )
    seen = len(answers.tokens("b"))
    gate.set()
    await answers.until("b", tokens=seen + 5)
    worker.abort("b")
    # One step may be under way when the gate is closed behind it.
    assert set(rows[1:]) == {1}


async def test_text_that_a_reader_of_tokens_lacks_is_made_up_for(tiny_worker: Served) -> None:
    worker, answers = tiny_worker
    worker.begin(greedy("whole", "Hello", 12))
    await answers.until("whole")
    tokens, text = answers.tokens("whole"), answers.text("whole")
    worker.begin(greedy("rest", "Hello", 12, resume_token_ids=tokens[:8], resume_characters=2))
    await answers.until("rest")
    assert answers.text("rest") == text[2:]
    assert answers.tokens("rest") == tokens[8:]


async def test_an_engine_that_hangs_is_given_up(start: Start) -> None:
    worker, answers = await start(stall_ms=40)
    gate = hold(worker)
    worker.begin(greedy("a", "Hello", 5))
    await answers.death()
    assert isinstance(answers.died, EngineStalledError)
    # It does not wait for the thread, which is still held.
    await worker.close()
    gate.set()


@pytest.mark.gpu
async def test_a_batch_on_the_device_says_what_generate_says(tiny_llama: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), dtype="float32", device="cuda"))
    worker.steps = answers = Answers()
    await worker.load()
    for prompt in PROMPTS:
        worker.begin(greedy(prompt, prompt, 20))
    await answers.until(*PROMPTS)
    await worker.close()
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == reference(tiny_llama, prompt, 20)
