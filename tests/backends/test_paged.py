"""Rows over pages: whoever joins, leaves, shares or waits, each text is what `generate` says, and nothing is computed twice."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from tests.backends.test_architectures import FAMILIES, SIZES, save
from tests.backends.test_engine import Start, causal_model, greedy, hold, prepared, starting
from tests.backends.test_lora import adapters
from tests.backends.tiny import Answers, ask, byte_tokenizer, reference
from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest

__all__ = ["adapters"]  # a fixture
#: Models whose scores are changed before they become weights.
SINKS = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "sliding_window": 12,
}
CAPPED = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12, "attn_logit_softcapping": 2.0}
HISTORY = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening comes."


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "paged") as start_one:
        yield start_one


def watched(worker: ModelWorker) -> list[list[int]]:
    """Tokens of each row, of each pass from now on."""
    passes: list[list[int]] = []

    def note(_: Any, __: Any) -> None:
        cache = current()
        if cache is not None and cache.passed is not None:
            passes.append(list(cache.passed.counts))

    causal_model(worker).register_forward_pre_hook(note)
    return passes


def cached(answers: Answers, name: str) -> int:
    usage = answers.last(name).usage
    assert usage is not None
    return usage.cached_tokens


def salted(request: GenerateRequest, salt: str) -> GenerateRequest:
    return structs.replace(request, extra={"cache_salt": salt})


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_joins_leaves_shares_and_waits_each_text_is_its_own(
    start: Start, tiny_llama: Path, seed: int
) -> None:
    chance = random.Random(seed)
    worker, answers = await start(kv_tokens_max=288, max_batch_size=6, prefill_chunk_tokens=24)
    wanted: dict[str, tuple[str, int]] = {}
    for number in range(24):
        name = f"{number}"
        begin = chance.choice(["", HISTORY[:20], HISTORY[:48], HISTORY])
        text = begin + "abcdefgh"[chance.randrange(8)] * chance.randrange(1, 60)
        count = chance.randrange(1, 40)
        worker.begin(greedy(name, text, count))
        if chance.random() < 0.2:
            worker.abort(name)
        else:
            wanted[name] = (text, count)
        if chance.random() < 0.4:
            await answers.until(chance.choice(list(wanted)), tokens=1) if wanted else None
    await answers.until(*wanted)
    assert not answers.errors
    for name, (text, count) in wanted.items():
        assert answers.tokens(name) == reference(tiny_llama, text, count)
    gauges = worker.load_report().gauges
    assert gauges["kv_tokens_free"] == 288
    assert gauges["prefix_cache_hits"] > 0


async def test_a_seed_draws_the_same_in_any_company(start: Start) -> None:
    asked: dict[str, Any] = {"seed": 7, "temperature": 1.0, "top_p": 0.9, "max_new_tokens": 40, "ignore_eos": True}
    worker, answers = await start()
    worker.begin(ask("alone", HISTORY, **asked))
    await answers.until("alone")
    crowded, heard = await start(kv_tokens_max=256, prefill_chunk_tokens=16)
    gate = hold(crowded)
    for number in range(4):
        crowded.begin(ask(f"{number}", f"{number}" * 30, **{**asked, "seed": number}))
    crowded.begin(ask("among others", HISTORY, **asked))
    await prepared(crowded)
    gate.set()
    await heard.until("among others", *map(str, range(4)))
    assert crowded.load_report().gauges["preemptions"] > 0
    assert heard.tokens("among others") == answers.tokens("alone")


async def test_a_second_turn_costs_its_new_tokens(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start()
    first = HISTORY * 3
    worker.begin(greedy("first", first, 20))
    await answers.until("first")
    assert cached(answers, "first") == 0
    passes = watched(worker)
    worker.begin(greedy("again", first, 20))
    await answers.until("again")
    assert cached(answers, "again") == (len(first) - 1) // 16 * 16
    assert sum(passes[0]) == len(first) - cached(answers, "again")
    assert answers.tokens("again") == answers.tokens("first") == reference(tiny_llama, first, 20)
    passes.clear()
    # What was answered is known as well: all of it but the newest token was computed.
    history = [*byte_tokenizer()(first)["input_ids"], *answers.tokens("first")]
    turn = structs.replace(greedy("second", "", 8), prompt=None, prompt_token_ids=[*history, 70, 71, 72])
    worker.begin(turn)
    await answers.until("second")
    assert cached(answers, "second") == (len(history) - 1) // 16 * 16
    assert sum(passes[0]) == len(history) + 3 - cached(answers, "second")


async def test_running_rows_share_what_they_begin_with(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start()
    worker.begin(greedy("first", HISTORY + "a", 100))
    await answers.until("first", tokens=1)
    worker.begin(greedy("beside", HISTORY + "b", 10))
    await answers.until("first", "beside")
    assert cached(answers, "beside") == len(HISTORY) // 16 * 16
    assert answers.tokens("first") == reference(tiny_llama, HISTORY + "a", 100)
    assert answers.tokens("beside") == reference(tiny_llama, HISTORY + "b", 10)


async def test_choices_of_a_request_share_their_prompt(start: Start) -> None:
    asked: dict[str, Any] = {"n": 4, "seed": 3, "max_new_tokens": 24, "ignore_eos": True}
    worker, answers = await start()
    passes = watched(worker)
    worker.begin(ask("four", HISTORY, **asked))
    await answers.until("four")
    assert passes[0] == [len(HISTORY)]
    assert set(map(tuple, passes[1:])) == {(1, 1, 1, 1)}
    # Four rows of their own would not fit.
    small, heard = await start(kv_tokens_max=224)
    watched_small = watched(small)
    small.begin(ask("four", HISTORY, **asked))
    await heard.until("four")
    assert max(map(len, watched_small)) == 4
    for choice in range(4):
        assert heard.tokens("four", choice) == answers.tokens("four", choice)
    assert len({tuple(answers.tokens("four", choice)) for choice in range(4)}) == 4


async def test_salts_keep_caches_apart(start: Start) -> None:
    worker, answers = await start()
    worker.begin(salted(greedy("first", HISTORY, 4), "team-7"))
    await answers.until("first")
    for name, salt in (("theirs", "team-8"), ("ours", "team-7")):
        worker.begin(salted(greedy(name, HISTORY, 4), salt))
    worker.begin(greedy("nobody's", HISTORY, 4))
    await answers.until("theirs", "ours", "nobody's")
    assert cached(answers, "theirs") == cached(answers, "nobody's") == 0
    assert cached(answers, "ours") == len(HISTORY) // 16 * 16


async def test_adapters_keep_caches_apart(start: Start, adapters: dict[str, Path]) -> None:
    name, path = next(iter(adapters.items()))
    worker, answers = await start(lora=(f"{name}={path}",))
    for number in range(2):
        for model in ("", name):
            asked = structs.replace(greedy(f"{model} {number}", HISTORY, 6), model=model or None)
            worker.begin(asked)
            await answers.until(asked.request_id)
            assert cached(answers, asked.request_id) == number * (len(HISTORY) // 16 * 16)
    assert answers.tokens(" 0") == answers.tokens(" 1")
    assert answers.tokens(f"{name} 0") == answers.tokens(f"{name} 1") != answers.tokens(" 0")


async def test_prompt_logprobs_are_told_of_what_is_cached(start: Start) -> None:
    worker, answers = await start()
    for name in ("first", "again"):
        worker.begin(greedy(name, HISTORY, 2, prompt_logprobs=1))
        await answers.until(name)
    assert cached(answers, "again") == 0
    assert answers.deltas["again"][0].prompt_logprobs == answers.deltas["first"][0].prompt_logprobs


async def test_prompts_are_computed_in_the_passes_of_running_rows(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(prefill_chunk_tokens=32)
    worker.begin(greedy("runs", "Hello", 200))
    await answers.until("runs", tokens=2)
    passes = watched(worker)
    gate = hold(worker)
    for name in ("long", "other"):
        worker.begin(greedy(name, name[0] * 200, 4))
    await prepared(worker)
    gate.set()
    await answers.until("long", "other")
    parts = [counts for counts in passes if max(counts) > 1]
    assert len(parts) >= 2 * 200 // 32
    # No pass is without the running row, and none exceeds the budget beside it.
    assert all(counts[0] == 1 and sum(counts[1:]) <= 33 for counts in parts)
    await answers.until("runs")
    for name in ("long", "other"):
        assert answers.tokens(name) == reference(tiny_llama, name[0] * 200, 4)


async def test_short_ones_run_beside_a_long_one(start: Start) -> None:
    worker, answers = await start(kv_tokens_max=1_120, max_batch_size=32)
    passes = watched(worker)
    worker.begin(greedy("long", "x" * 380, 60))
    await answers.until("long", tokens=1)
    gate = hold(worker)
    names = [f"short {number}" for number in range(16)]
    for name in names:
        worker.begin(greedy(name, name, 20))
    await prepared(worker)
    gate.set()
    await answers.until(*names)
    assert not answers.ended("long")
    # By padding there would have been room for two rows.
    assert max(map(len, passes)) == 17


async def test_what_is_kept_makes_room_for_what_runs(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(kv_tokens_max=160)
    for letter in "abcdef":
        worker.begin(greedy(letter, letter * 100, 8))
        await answers.until(letter)
        assert answers.tokens(letter) == reference(tiny_llama, letter * 100, 8)
    assert worker.load_report().gauges["preemptions"] == 0
    worker.begin(greedy("again", "f" * 100, 8))
    await answers.until("again")
    assert cached(answers, "again") == 96


@pytest.mark.parametrize("family", ["MistralConfig", "Qwen2Config", "Gemma3TextConfig"])
async def test_what_no_layer_looks_back_at_is_given_back(family: str, tmp_path: Path, start: Start) -> None:
    """Where all layers have windows, rows run beside one another that the cache could not hold as a whole."""
    directory = save(tmp_path, family, {**SIZES, **FAMILIES[family]})
    worker, answers = await start(model=str(directory), kv_tokens_max=256, prefill_chunk_tokens=32)
    names = [letter * 60 for letter in "abc"]
    gate = hold(worker)
    for name in names:
        worker.begin(greedy(name, name, 120))
    await prepared(worker)
    gate.set()
    await answers.until(*names)
    for name in names:
        assert answers.tokens(name) == reference(directory, name, 120)
    gauges = worker.load_report().gauges
    assert (gauges["preemptions"] == 0) is (family == "MistralConfig")
    assert gauges["kv_tokens_free"] == 256


@pytest.mark.parametrize(
    ("family", "extra", "paged"),
    [
        ("Qwen2Config", FAMILIES["Qwen2Config"], True),
        ("MistralConfig", FAMILIES["MistralConfig"], True),
        ("Gemma3TextConfig", FAMILIES["Gemma3TextConfig"], True),
        ("GPT2Config", FAMILIES["GPT2Config"], True),
        ("MixtralConfig", FAMILIES["MixtralConfig"], True),
        ("Qwen3MoeConfig", FAMILIES["Qwen3MoeConfig"], True),
        ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, False),
        ("BloomConfig", FAMILIES["BloomConfig"], False),
        ("GptOssConfig", SINKS, True),
        ("Gemma2Config", CAPPED, True),
    ],
)
async def test_a_model_says_which_cache_it_has(
    family: str, extra: dict[str, Any], paged: bool, tmp_path: Path, start: Start
) -> None:
    directory = save(tmp_path, family, {**SIZES, **extra})
    if not paged:
        with pytest.raises(ConfigurationError, match="cannot have a paged cache"):
            await start(model=str(directory))
    worker, answers = await start(model=str(directory), kv_cache=TransformersOptions(model="").kv_cache)
    worker.begin(greedy("text", HISTORY, 8))
    await answers.until("text")
    assert answers.tokens("text") == reference(directory, HISTORY, 8)
    details = worker._models()[0].details
    assert details["kv_cache"] == ("paged" if paged else "padded")
    assert bool(details.get("kv_cache_padded_because")) is not paged


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_device_pages_its_cache(start: Start, tiny_llama: Path, dtype: str) -> None:
    worker, answers = await start(device="cuda", dtype=dtype, kv_tokens_max=4_096)
    first = HISTORY * 5
    for name in ("first", "again"):
        worker.begin(greedy(name, first, 40))
        worker.begin(greedy(f"{name} short", "Hello", 40))
        await answers.until(name, f"{name} short")
    assert cached(answers, "again") == 256
    if dtype == "float32":
        assert answers.tokens("again") == reference(tiny_llama, first, 40)
        assert answers.tokens("again short") == reference(tiny_llama, "Hello", 40)
