"""Speculative decoding: whoever guesses, and however wrongly, each answer is what it is without, and ends as it does without."""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from transformers import AutoModelForCausalLM

from tests.backends.test_architectures import FAMILIES, save
from tests.backends.test_engine import Start, causal_model, greedy, hold, prepared, starting
from tests.backends.test_lora import adapters
from tests.backends.test_paged import HISTORY, watched
from tests.backends.test_weights import operate, steps
from tests.backends.tiny import Answers, ask, byte_tokenizer, reference, save_llama
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.cache.paged_cache import current
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.request.sequence import Sequence
from zfabric.backends.hf_transformers.setup.speculation_setup import speculation_of
from zfabric.backends.hf_transformers.speculative.ngram_proposer import NgramIndex, NgramProposer
from zfabric.backends.hf_transformers.speculative.speculation import DraftLength, right
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError
from zfabric.wire.payloads import GenerateRequest

__all__ = ["adapters", "steps"]  # fixtures
#: Text that repeats itself, as a greedy tiny model's does.
REPEATED = "one two three, one two three, one two "


@pytest.fixture(scope="session")
def other_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An assistant that is often wrong: other weights near the model's, and no vectors for some tokens of the vocabulary."""
    directory = tmp_path_factory.mktemp("other-llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(3)
    for weight in model.parameters():
        weight.data += 0.1 * weight.std() * torch.randn_like(weight)
    model.resize_token_embeddings(250)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "paged") as start_one:
        yield start_one


def requests(stop: str) -> list[GenerateRequest]:
    """Of all kinds: guessed for and not, with every way to end, several choices, and one that goes on.

    Args:
        stop: What greedy text of HISTORY has in it.
    """
    seeded: dict[str, Any] = {"temperature": 0.7, "seed": 11, "ignore_eos": True}
    begun = [70, 71, 72, 70, 71, 72, 70]
    return [
        greedy("greedy", HISTORY, 60),
        greedy("stops", HISTORY, 60, stop=[stop]),
        greedy("one token", HISTORY, 1),
        greedy("two tokens", REPEATED, 2),
        greedy("logprobs", REPEATED, 40, logprobs=2, prompt_logprobs=1),
        ask("draws", HISTORY, max_new_tokens=40, **seeded),
        ask("draws from few", REPEATED, max_new_tokens=40, top_p=0.8, top_k=40, logprobs=0, **seeded),
        ask(
            "ends",
            REPEATED,
            max_new_tokens=60,
            temperature=0.9,
            seed=5,
            min_new_tokens=6,
            stop_token_ids=[*range(60, 90)],
        ),
        ask("three", HISTORY, max_new_tokens=24, n=3, **seeded),
        ask("best", REPEATED, max_new_tokens=16, n=2, best_of=3, logprobs=1, **seeded),
        greedy("penalised", REPEATED, 40, repetition_penalty=1.2, frequency_penalty=0.1),
        greedy("guided", HISTORY, 24, guided_regex="(ab|cd){4,9}"),
        greedy("biased", REPEATED, 30, logit_bias={75: 3.0, 80: -50.0}, bad_words=["ab"], echo=True),
        greedy("resumed", REPEATED, 40, resume_token_ids=begun, resume_characters=3),
    ]


def told(answers: Answers, name: str) -> Any:
    """All that an answer says, choice by choice: its log-probabilities are there beside."""
    deltas = answers.deltas[name]
    usage = deltas[-1].usage
    assert usage is not None
    assert name not in answers.errors
    choices = sorted({delta.index for delta in deltas})
    ends = [(delta.index, delta.finish_reason, delta.stop_reason) for delta in deltas if delta.finish_reason]
    said = [(answers.text(name, index), answers.tokens(name, index)) for index in choices]
    return said, sorted(ends, key=str), usage.prompt_tokens, usage.completion_tokens


def logprobs(answers: Answers, name: str) -> list[tuple[int, list[Any]]]:
    entries = [
        (delta.index, entry)
        for delta in answers.deltas[name]
        for entry in [*(delta.prompt_logprobs or ()), *(delta.logprobs or ())]
    ]
    return [
        (
            index,
            []
            if entry is None
            else [(one.token_id, pytest.approx(one.logprob, abs=1e-3)) for one in (entry.token, *entry.top)],
        )
        for index, entry in sorted(entries, key=lambda one: one[0])
    ]


def counted(worker: ModelWorker) -> tuple[int, int]:
    """Drafted and accepted so far."""
    gauges = worker.load_report().gauges
    assert gauges["draft_failures"] == 0
    return int(gauges["draft_tokens"]), int(gauges["accepted_draft_tokens"])


async def all_answered(start: Start, asked: list[GenerateRequest], **options: Any) -> tuple[ModelWorker, Answers]:
    worker, answers = await start(prefill_chunk_tokens=32, max_batch_size=6, **options)
    gate = hold(worker)
    for one in asked:
        worker.begin(one)
    await prepared(worker)
    gate.set()
    await answers.until(*(one.request_id for one in asked))
    return worker, answers


def by_chance(plain: Answers, seed: int) -> Callable[[Any, Any], list[list[int]]]:
    """Drafts that are right for a while and then wrong, each as long as chance has it, beyond what ends a text as well."""
    chance = random.Random(seed)

    def propose(_: Any, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        drafts = []
        for sequence, count in asked:
            known = plain.tokens(sequence.answer.request.request_id, sequence.index)
            come = known[len(sequence.output) :][: chance.choice([0, 1, 2, count])]
            drafts.append(
                [*come, *(chance.randrange(259) for _ in range(count - len(come)))][: chance.randint(0, count)]
            )
        return drafts

    return propose


async def test_every_answer_is_what_it_is_without(
    start: Start, tiny_llama: Path, other_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = byte_tokenizer().decode(reference(tiny_llama, HISTORY, 60)[21:24])
    asked = requests(stop)
    _, plain = await all_answered(start, asked, kv_tokens_max=2_048)
    assert told(plain, "stops")[1] == [(0, "stop", stop)]
    assert told(plain, "ends")[1][0][1] == "stop"
    by_ngram: dict[str, Any] = {"speculation": "ngram", "prompt_lookup_min": 1}
    by_itself = {"speculation": "assistant", "assistant": str(tiny_llama), "num_speculative_tokens": 5}
    by_another = {"speculation": "assistant", "assistant": str(other_llama)}
    guesses = NgramProposer.propose
    for options, room, other in (
        (by_ngram, 2_048, guesses), (by_itself, 2_048, guesses), (by_another, 224, guesses),
        (by_ngram, 2_048, by_chance(plain, 1)), (by_ngram, 224, by_chance(plain, 2)),
    ):  # fmt: skip
        monkeypatch.setattr(NgramProposer, "propose", other)
        worker, answers = await all_answered(start, asked, kv_tokens_max=room, **options)
        for one in asked:
            assert told(answers, one.request_id) == told(plain, one.request_id), (options, one.request_id)
            assert logprobs(answers, one.request_id) == logprobs(plain, one.request_id), (options, one.request_id)
        gauges = worker.load_report().gauges
        assert gauges["kv_tokens_free"] == room
        assert (gauges["preemptions"] > 0) is (room < 2_048)
        drafted, accepted = counted(worker)
        # Texts of random weights hardly repeat themselves.
        assert drafted > 60
        assert accepted == drafted if options is by_itself else 0 < accepted < drafted * 0.8


@pytest.mark.parametrize("kind", ["int8", "fp8"])
async def test_guesses_over_narrow_keys_and_values_change_nothing(start: Start, kind: str) -> None:
    asked = [one for one in requests("\0") if one.request_id in ("greedy", "logprobs", "draws", "three", "resumed")]
    _, plain = await all_answered(start, asked, kv_cache_dtype=kind)
    worker, answers = await all_answered(start, asked, kv_cache_dtype=kind, speculation="ngram", prompt_lookup_min=1)
    for one in asked:
        assert told(answers, one.request_id) == told(plain, one.request_id)
        assert logprobs(answers, one.request_id) == logprobs(plain, one.request_id)
    drafted, accepted = counted(worker)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("streams", [1, 3])
async def test_a_text_that_repeats_itself_takes_fewer_passes(start: Start, streams: int) -> None:
    worker, answers = await start(speculation="ngram", num_speculative_tokens=6)
    passes = watched(worker)
    gate = hold(worker)
    for number in range(streams):
        worker.begin(greedy(f"{number}", "abcdef" * 6, 60, logit_bias={70 + number: 1_000.0}))
    await prepared(worker)
    gate.set()
    await answers.until(*map(str, range(streams)))
    for number in range(streams):
        assert answers.tokens(f"{number}") == [70 + number] * 60
    drafted, accepted = counted(worker)
    # Nothing is there to be found until it has come twice, and the last token is drawn after the last draft.
    assert accepted == drafted > streams * 40
    assert len(passes) < 20
    assert max(max(counts) for counts in passes[1:]) == 7


async def test_what_is_guessed_for_many_is_bounded_in_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.backends.hf_transformers.speculative.speculation._PASS_TOKENS_MAX", {"cpu": 10})
    worker, answers = await start(speculation="ngram")
    passes = watched(worker)
    gate = hold(worker)
    for number in range(6):
        worker.begin(greedy(f"{number}", REPEATED, 10 if number else 80, logit_bias={70: 1_000.0}))
    await prepared(worker)
    gate.set()
    await answers.until(*map(str, range(6)))
    stepped = [counts for counts in passes if max(counts) < len(REPEATED)]
    assert all(sum(counts) <= 10 for counts in stepped)
    assert max(counts[-1] for counts in stepped if len(counts) == 6) == 1
    assert max(counts[-1] for counts in stepped if len(counts) == 1) > 4


@pytest.mark.parametrize("way", ["ngram", "assistant"])
async def test_who_is_cancelled_in_the_middle_leaves_the_others_as_they_are(
    start: Start, tiny_llama: Path, way: str
) -> None:
    assistant = {"assistant": str(tiny_llama)} if way == "assistant" else {}
    worker, answers = await start(speculation=way, kv_tokens_max=512, **assistant)
    for name in ("goes", "stays"):
        worker.begin(greedy(name, HISTORY + name, 100))
    await answers.until("goes", "stays", tokens=5)
    worker.abort("goes")
    worker.begin(greedy("goes", HISTORY, 20))
    await answers.until("goes", "stays")
    assert answers.tokens("stays") == reference(tiny_llama, HISTORY + "stays", 100)
    assert answers.tokens("goes")[-20:] == reference(tiny_llama, HISTORY, 20)
    assert worker.load_report().gauges["kv_tokens_free"] == 512


async def test_windows_that_slide_give_nothing_back_that_a_wrong_draft_was_beyond(start: Start, tmp_path: Path) -> None:
    directory = save(tmp_path, "MistralConfig", FAMILIES["MistralConfig"])
    worker, answers = await start(
        model=str(directory), speculation="ngram", prompt_lookup_min=1, kv_tokens_max=256, prefill_chunk_tokens=32
    )
    names = ["abcabcab" * 8, "xyxyxyxx" * 8]
    for name in names:
        worker.begin(greedy(name, name, 100))
    await answers.until(*names)
    drafted, accepted = counted(worker)
    assert 0 < accepted < drafted
    for name in names:
        assert answers.tokens(name) == reference(directory, name, 100)


async def test_rows_with_adapters_are_guessed_for_by_what_the_assistant_is(
    start: Start, tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    name, path = next(iter(adapters.items()))
    plain, before = await start(lora=(f"{name}={path}",))
    worker, answers = await start(lora=(f"{name}={path}",), speculation="assistant", assistant=str(tiny_llama))
    for one, heard in ((plain, before), (worker, answers)):
        for model in ("", name):
            one.begin(structs.replace(greedy(f"by {model}", HISTORY, 40), model=model or None))
        await heard.until("by ", f"by {name}")
    for asked in ("by ", f"by {name}"):
        assert answers.tokens(asked) == before.tokens(asked)
    drafted, accepted = counted(worker)
    assert 30 < accepted < drafted


async def test_other_weights_leave_the_assistant_as_it_is(start: Start, tiny_llama: Path, steps: Path) -> None:
    worker, answers = await start(
        speculation="assistant", assistant=str(tiny_llama), weights_dir=steps, weight_version="step-0"
    )
    worker.begin(greedy("before", HISTORY, 30))
    await answers.until("before")
    drafted, accepted = counted(worker)
    assert accepted == drafted > 20
    worker.begin(greedy("runs", HISTORY, 200))
    await answers.until("runs", tokens=3)
    await operate(worker, "reload_weights", path="step-1", weight_version="step-1", mode="recompute")
    worker.begin(greedy("after", HISTORY, 30))
    await answers.until("after", "runs")
    assert answers.tokens("after") == reference(steps / "step-1", HISTORY, 30)
    more, of_these = counted(worker)
    assert of_these - accepted < more - drafted
    ends = answers.last("runs").extra
    assert ends is not None
    first, second = ends["weight_versions"]
    assert (first["start"], first["end"], second["end"]) == (0, second["start"], 200)
    count = first["end"]
    assert answers.tokens("runs")[:count] == reference(tiny_llama, HISTORY, count)


async def test_whoever_cannot_guess_costs_nobody_anything(
    start: Start, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = await start(speculation="ngram", prompt_lookup_min=1)
    monkeypatch.setattr(NgramIndex, "draft", lambda *_: 1 / 0)
    worker.begin(greedy("goes on", HISTORY, 20))
    await answers.until("goes on")
    assert answers.tokens("goes on") == reference(tiny_llama, HISTORY, 20)
    gauges = worker.load_report().gauges
    assert (gauges["draft_failures"], gauges["draft_tokens"], gauges["engine_restarts"]) == (1, 0, 0)


async def test_a_pass_that_finds_no_memory_for_drafts_is_tried_without_them(start: Start) -> None:
    worker, answers = await start(speculation="ngram")
    failed: list[int] = []

    def short(_: Any, given: Any) -> None:
        cache = current()
        if cache is not None and cache.passed is not None and not failed and 1 < max(cache.passed.counts) < 8:
            failed.append(1)
            raise torch.OutOfMemoryError("no memory for this")

    causal_model(worker).register_forward_pre_hook(short)
    gate = hold(worker)
    for name in ("one", "two"):
        worker.begin(greedy(name, REPEATED, 30, logit_bias={70: 1_000.0}))
    await prepared(worker)
    gate.set()
    await answers.until("one", "two")
    assert failed
    assert not answers.errors
    assert answers.tokens("one") == answers.tokens("two") == [70] * 30
    assert worker.load_report().gauges["draft_failures"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": "assistant"}, "no assistant is given"),
        ({"assistant": "x"}, "'x' is given, but speculation is None"),
        ({"speculation": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"speculation": "ngram", "prompt_lookup_max": 1}, "prompt_lookup_max is 1, less than prompt_lookup_min, 2"),
        ({"speculation": "ngram", "kv_cache": "padded"}, "its rows are padded: it is asked for"),
        ({"speculation": "assistant", "assistant": "/nowhere"}, "'/nowhere' cannot be loaded"),
    ],
)
async def test_what_does_not_go_together_is_refused_by_name(
    start: Start, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        await start(**options)


async def test_assistants_that_do_not_fit_are_refused_by_name(start: Start, tmp_path: Path) -> None:
    padded = save(tmp_path / "padded", "BloomConfig", FAMILIES["BloomConfig"])
    with pytest.raises(ConfigurationError, match=r"padded' cannot have a paged cache"):
        await start(speculation="assistant", assistant=str(padded))
    other = save(tmp_path / "other", "LlamaConfig", {})
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigurationError, match=r"another vocabulary than .*: '<more>' is 259 and not None"):
        await start(speculation="assistant", assistant=str(other))


async def test_an_assistant_reads_no_further_than_it_can(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    worker, answers = await start(speculation="assistant", assistant=str(save_llama(tmp_path, positions=104)))
    passes = watched(worker)
    for name in ("short", "long"):
        worker.begin(greedy(name, HISTORY[:60] if name == "short" else HISTORY, 60))
        await answers.until(name)
        assert answers.tokens(name) == reference(tiny_llama, HISTORY[: 60 if name == "short" else None], 60)
        drafted, accepted = counted(worker)
        assert accepted == drafted > (30 if name == "short" else 40)
    # What it cannot read has steps as ever.
    assert passes[-1] == passes[-30] == [1]


def test_layers_with_a_state_that_cannot_be_taken_back_are_refused_by_name() -> None:
    config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    loaded: Any = SimpleNamespace(generates=True, model=model)
    options = TransformersOptions(model="hybrid", speculation="ngram")
    with pytest.raises(ConfigurationError, match="'hybrid': it has layers of kind linear_attention, whose state"):
        speculation_of(options, loaded, model, None, None)  # type: ignore[arg-type]


async def test_a_model_says_who_guesses_and_the_cache_counts_both(start: Start, tiny_llama: Path) -> None:
    worker, _ = await start(speculation="assistant", assistant=str(tiny_llama))
    details = worker._models()[0].details
    assert (details["speculation"], details["assistant"]) == ("assistant", str(tiny_llama))
    plain, _ = await start()
    assert "speculation" not in plain._models()[0].details
    assert "draft_tokens" not in plain.load_report().gauges
    assert details["kv_tokens_max"] == int(str(plain._models()[0].details["kv_tokens_max"])) // 2


async def test_what_is_drawn_together_arrives_token_by_token(tiny_llama: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            options = TransformersOptions(
                model=str(tiny_llama), model_names=("tiny",), dtype="float32", device="cpu",
                speculation="assistant", assistant=str(tiny_llama),
            )  # fmt: skip
            worker = ModelWorker(options)
            await made.add_worker("w", worker)
            asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
            tokens = [token async for delta in client.stream("tiny", HISTORY, **asked) for token in delta.token_ids]
            both = await client.generate("tiny", HISTORY, n=2, logprobs=0, **asked)
            drafted, accepted = counted(worker)
            assert accepted == drafted > 100
    expected = reference(tiny_llama, HISTORY, 60)
    assert tokens == expected
    for choice in both.choices:
        assert choice.token_ids == expected
        assert choice.logprobs is not None
        assert [entry.token.token_id for entry in choice.logprobs] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["ngram", "assistant"])
async def test_a_device_draws_what_it_draws_without(start: Start, tiny_llama: Path, way: str) -> None:
    assistant = {"assistant": str(tiny_llama)} if way == "assistant" else {}
    worker, answers = await start(device="cuda", kv_tokens_max=8_192, speculation=way, prompt_lookup_min=1, **assistant)
    for name in ("first", "second"):
        worker.begin(greedy(name, HISTORY + name, 60))
    await answers.until("first", "second")
    for name in ("first", "second"):
        assert answers.tokens(name) == reference(tiny_llama, HISTORY + name, 60)
    drafted, accepted = counted(worker)
    assert accepted == drafted > 80 if assistant else drafted > 0


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 3), st.integers(0, 3), st.integers(1, 6))
def test_drafts_are_what_followed_the_longest_likeness(text: list[int], least: int, more: int, count: int) -> None:
    index = NgramIndex(least, least + more)
    for begin in range(0, len(text), 5):
        index.add(text[begin : begin + 5])

    def alike(end: int) -> int:
        length = 0
        while length < min(end, least + more) and text[end - length - 1] == text[len(text) - length - 1]:
            length += 1
        return length

    places = [end for end in range(least, len(text)) if alike(end) >= least][-16:]
    if not places:
        assert index.draft(count) == []
        return
    best = max(places, key=lambda end: (alike(end), end))
    expected = list(text)
    for _ in range(count):
        expected.append(expected[best + len(expected) - len(text)])
    assert index.draft(count) == expected[len(text) :]


@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), min_size=7, max_size=7))
def test_drafts_count_until_the_first_that_is_not_drawn(drafts: list[int], drawn: list[int]) -> None:
    count = right(drafts, [(token, None) for token in drawn])
    assert drafts[:count] == drawn[:count]
    assert count == len(drafts) or drafts[count] != drawn[count]


def test_drafts_grow_while_they_are_right_and_rest_where_they_are_not() -> None:
    length = DraftLength(16)
    asked = []
    for accepted in (4, 8, 16, 3, 4, 0, 1):
        asked.append(length.next())
        length.took(asked[-1], accepted)
    assert asked == [4, 8, 16, 16, 4, 8, 1]
    length = DraftLength(16)
    steps = [0] * 1_000
    for step in range(1_000):
        count = length.next()
        if count:
            steps[step] = count
            length.took(count, 0)
    # Never right: once in 65 steps in the end.
    assert [step for step, count in enumerate(steps) if count][:6] == [0, 1, 4, 9, 18, 35]
    assert sum(steps[-650:]) == 10
