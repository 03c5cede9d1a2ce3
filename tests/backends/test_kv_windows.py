"""Models in which some layers have a window and others none: blocks behind windows go, and no text is another one for that."""

from __future__ import annotations

import functools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.backends.test_architectures import GROUPED, SIZES, save
from tests.backends.test_engine import Start, greedy, hold, prepared, starting
from tests.backends.test_paged import CAPPED, HISTORY, SINKS, cached, watched
from tests.backends.test_step_graphs import played_by
from tests.backends.tiny import ask, byte_tokenizer
from zfabric.backends.hf_transformers.cache import kv_layout
from zfabric.backends.hf_transformers.cache.attention import install
from zfabric.backends.hf_transformers.cache.block_table import table_of
from zfabric.backends.hf_transformers.cache.kv_layout import ONE_TABLE, layout_of
from zfabric.backends.hf_transformers.checks import paged_check
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner, Part
from zfabric.backends.hf_transformers.runner.step_graphs import plain
from zfabric.backends.hf_transformers.runner.tensor_parallel import LeadingRunner
from zfabric.backends.hf_transformers.scheduling import engine
from zfabric.backends.hf_transformers.scheduling.ahead_core import AheadCore
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.setup import assembly, rank
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.wire.payloads import GenerateRequest

LONG = {"max_position_embeddings": 512}
#: Three layers with a window, and one without.
MOSTLY = {**GROUPED, **LONG, "num_hidden_layers": 4, "sliding_window": 12}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "Gemma2Config": (2, {**CAPPED, **LONG}),
    "Gemma3TextConfig": (4, {**MOSTLY, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "GptOssConfig": (2, {**SINKS, **LONG}),
}


@functools.cache
def _loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def alone(directory: Path, text: str, count: int) -> list[int]:
    """What `generate` says with transformers' own attention, which leaves no cap out."""
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    output = _loaded(directory).generate(
        input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "paged") as start_one:
        yield start_one


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save(tmp_path_factory.mktemp(family), family, {**SIZES, **extra})
        for family, (_, extra) in KINDS.items()
    }


@pytest.fixture(scope="module")
def gemma(saved: dict[str, Path]) -> Path:
    return saved["Gemma3TextConfig"]


def core_of(worker: ModelWorker) -> PagedCore:
    assert worker._assembled is not None
    core = worker._assembled.engine._core
    assert isinstance(core, PagedCore)
    return core


async def various(start: Start, directory: Path, seed: int, **options: Any) -> tuple[ModelWorker, int]:
    """Rows join, leave, share beginnings and wait for room; each says what the model says alone. Returns how many waited."""
    chance = random.Random(seed)
    chosen = {"model": str(directory), "kv_tokens_max": 128, "max_batch_size": 6, "prefill_chunk_tokens": 24, **options}
    worker, answers = await start(**chosen)
    wanted: dict[str, tuple[str, int]] = {letter: (letter, 44) for letter in "abcd"}
    gate = hold(worker)
    for name, its in wanted.items():
        worker.begin(greedy(name, *its))
    await prepared(worker)
    gate.set()
    for number in range(5):
        name = f"{number}"
        begin = chance.choice([HISTORY[:20], HISTORY[:48], HISTORY])
        wanted[name] = (begin + "abcd"[chance.randrange(4)] * chance.randrange(1, 50), chance.choice([4, 24]))
        worker.begin(greedy(name, *wanted[name]))
        if chance.random() < 0.4:
            await answers.until(chance.choice(list(wanted)), tokens=1)
    await answers.until(*wanted)
    assert not answers.errors
    for name, (text, count) in wanted.items():
        assert answers.tokens(name) == alone(directory, text, count)
    gauges = worker.load_report().gauges
    assert gauges["kv_tokens_free"] == chosen["kv_tokens_max"]
    assert gauges["prefix_cache_hits"] > 0
    return worker, int(gauges["preemptions"])


@pytest.mark.parametrize("family", KINDS)
async def test_whatever_joins_leaves_shares_and_waits_each_text_is_its_own(
    family: str, saved: dict[str, Path], start: Start
) -> None:
    worker, waited = await various(start, saved[family], 1)
    assert waited > 0
    assert worker._models()[0].details["kv_tables"] == KINDS[family][0]


async def test_steps_ahead_of_the_host_keep_what_they_look_at(
    gemma: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_AHEAD", {"cpu"})
    worker, waited = await various(start, gemma, 2)
    core = core_of(worker)
    assert isinstance(core, AheadCore)
    assert core.steps_ahead > 20
    assert waited > 0


async def test_drafts_that_are_wrong_cost_no_token_that_a_window_needs(gemma: Path, start: Start) -> None:
    worker, _ = await various(start, gemma, 3, speculation="ngram", prompt_lookup_min=1, kv_tokens_max=256)
    gauges = worker.load_report().gauges
    assert 0 < gauges["accepted_draft_tokens"] < gauges["draft_tokens"]


async def test_recorded_steps_have_a_table_for_each_group(
    gemma: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "capture_of", lambda device: plain)
    worker, answers = await start(model=str(gemma), kv_tokens_max=512, max_batch_size=3, context_length=200)
    played = played_by(worker)
    names = [f"{letter}{HISTORY[:40]}" for letter in "abc"]
    for name in names:
        worker.begin(greedy(name, name, 30))
    await answers.until(*names)
    for name in names:
        assert answers.tokens(name) == alone(gemma, name, 30)
    assert len(played) > 25


async def test_choices_have_windows_of_their_own(gemma: Path, start: Start) -> None:
    asked: dict[str, Any] = {"n": 4, "seed": 3, "max_new_tokens": 50, "ignore_eos": True}
    found = []
    for room in (1_024, 240):
        worker, answers = await start(model=str(gemma), kv_tokens_max=room)
        passes = watched(worker)
        worker.begin(ask("four", HISTORY, **asked))
        await answers.until("four")
        assert (1, 1, 1, 1) in set(map(tuple, passes))
        found.append([answers.tokens("four", choice) for choice in range(4)])
        assert worker.load_report().gauges["kv_tokens_free"] == room
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == 4


async def test_narrow_keys_and_values_say_what_they_say_in_one_table(
    gemma: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for one in (False, True):
        if one:
            monkeypatch.setattr(paged_check, "layout_of", lambda *_, **__: ONE_TABLE)
        worker, answers = await start(model=str(gemma), kv_cache_dtype="int8", kv_tokens_max=512)
        assert ("kv_tables" in worker._models()[0].details) is not one
        for name in ("first", "again"):
            worker.begin(greedy(name, HISTORY, 60))
            await answers.until(name)
        assert cached(answers, "again") == len(HISTORY) // 16 * 16
        found.append(answers.tokens("first"))
        assert answers.tokens("again") == answers.tokens("first")
    assert found[0] == found[1]


async def test_a_second_turn_costs_its_new_tokens_and_a_branch_what_is_gone(gemma: Path, start: Start) -> None:
    worker, answers = await start(model=str(gemma), kv_tokens_max=256)
    first = HISTORY * 2
    worker.begin(greedy("first", first, 20))
    await answers.until("first")
    history = [*byte_tokenizer()(first)["input_ids"], *answers.tokens("first")]
    turn = msgspec.structs.replace(greedy("second", "", 8), prompt=None, prompt_token_ids=[*history, 70, 71, 72])
    worker.begin(turn)
    await answers.until("second")
    assert cached(answers, "second") == (len(history) - 1) // 16 * 16
    # What windows left behind is known until its place is wanted, so another text may leave the first one before its end.
    branch = first[:100] + "!"
    worker.begin(greedy("branch", branch, 20))
    await answers.until("branch")
    assert cached(answers, "branch") == 96
    # Blocks that no window had any more, and those alone, have been used for another text.
    pool = core_of(worker)._pool
    worker.begin(greedy("other", "x" * 150, 20))
    await answers.until("other")
    tokens = [*byte_tokenizer()(first)["input_ids"]]
    assert pool.find(tokens[:120], (0, "", None)).whole < 7
    worker.begin(greedy("again", first[:120], 20))
    await answers.until("again")
    assert cached(answers, "again") < 112
    for name, text in (("first", first), ("branch", branch), ("again", first[:120])):
        assert answers.tokens(name) == alone(gemma, text, 20)


async def test_what_windows_do_not_reach_makes_room(gemma: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows run at once in the same memory, and each has no more for its windows than these reach."""
    most = []
    names = [letter * 140 for letter in "abcde"]
    for one in (False, True):
        if one:
            monkeypatch.setattr(paged_check, "layout_of", lambda *_, **__: ONE_TABLE)
        worker, answers = await start(model=str(gemma), kv_tokens_max=256, prefill_chunk_tokens=16, max_batch_size=5)
        passes, core = watched(worker), core_of(worker)
        counts: list[int] = []

        def note(_: Any, __: Any, core: PagedCore = core, counts: list[int] = counts) -> None:
            tables = [table for row in core._rows for table in row.tables.each[1:]]
            counts.extend(len(table.blocks) - table.given_back for table in tables)

        assert worker._assembled is not None
        worker._assembled.loaded.model.register_forward_pre_hook(note)
        gate = hold(worker)
        for name in names:
            worker.begin(greedy(name, name, 30))
        await prepared(worker)
        gate.set()
        await answers.until(*names)
        for name in names:
            assert answers.tokens(name) == alone(gemma, name, 30)
        most.append(max(map(len, passes)))
        # A window of 12 tokens, and a part of 16 of a prompt with the drafts that a row could have.
        assert max(counts, default=0) <= (0 if one else 4)
    assert most[0] >= 2 * most[1]


async def test_the_longest_text_fits_alone(gemma: Path, start: Start) -> None:
    worker, answers = await start(model=str(gemma), kv_tokens_max=128, prefill_chunk_tokens=16)
    length = worker._models()[0].context_length
    assert 2 * 128 < length < 512
    worker.begin(greedy("long", HISTORY * 2, length - 2 * len(HISTORY)))
    await answers.until("long")
    assert answers.tokens("long") == alone(gemma, HISTORY * 2, length - 2 * len(HISTORY))
    assert worker.load_report().gauges["preemptions"] == 0
    assert worker._models()[0].details["kv_tokens_max"] == 128


async def test_a_model_that_would_have_too_many_tables_says_so(
    gemma: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_layout, "_TABLES_MAX", 3)
    worker, answers = await start(model=str(gemma), kv_tokens_max=256)
    assert answers.logged == ["kv_windows_kept"]
    details = worker._models()[0].details
    assert details["kv_windows_kept_because"] == "its groups of layers need 4 tables, more than 3"
    assert "kv_tables" not in details
    worker.begin(greedy("text", HISTORY, 8))
    await answers.until("text")
    assert answers.tokens("text") == alone(gemma, HISTORY, 8)


class _Pipe:
    """What a rank would be told, as it would come out of its pipe."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def send(self, *message: Any) -> None:
        self.told.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message, enc_hook=str)))


def test_ranks_have_the_same_tables(gemma: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gemma), dtype=torch.float32).eval()
    install(model)
    layout = layout_of({0: 12, 1: 12, 2: 12, 3: None}, 512, ahead=16, alike=True)
    pipe = _Pipe()
    leading = LeadingRunner(ModelRunner(model), 8, 16, None, layout, pipe)  # type: ignore[arg-type]
    nobody = Answer(GenerateRequest())
    with torch.inference_mode():
        leading.forward([Part(nobody, list(range(20)), 20, table_of([0, 1], [2, 3], [4, 5], [6, 7]), "last")])
        leading.cache.copy(7, 3)
        (_, blocks, tokens, narrow, told), (_, rows, drawn), (_, source, target) = pipe.told
        other = PagedRunner(ModelRunner(model), blocks, tokens, narrow, rank.layout_told(told))
        rank._pass(other, rows, drawn)
        other.cache.copy(source, target)
    for slot, pool in leading.cache._pools.items():
        assert torch.equal(pool.keys, other.cache._pools[slot].keys)
        assert torch.equal(pool.values, other.cache._pools[slot].values)
    assert len(leading.cache._pools) == layout.slots == 1
