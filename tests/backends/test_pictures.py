"""Prompts with pictures in a running batch: each picture is seen in a pass of its own, and the prompt is computed in parts."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.backends.pictures import ask, chat, png, text
from tests.backends.seeing import IMAGE, Processor, expected, save
from tests.backends.tiny import Answers
from zfabric.backends.hf_transformers.loading import model_loader
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner import vision
from zfabric.backends.hf_transformers.runner.paged_runner import PagedRunner
from zfabric.backends.hf_transformers.runner.step_graphs import StepGraphs
from zfabric.backends.hf_transformers.runner.step_graphs import plain as plain_capture
from zfabric.backends.hf_transformers.runner.vision import Vision
from zfabric.backends.hf_transformers.scheduling import engine
from zfabric.backends.hf_transformers.scheduling.engine import Engine
from zfabric.backends.hf_transformers.setup import assembly
from zfabric.backends.hf_transformers.speculative.ngram_proposer import NgramProposer
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import BackendError

Start = Callable[..., Any]
#: One with images of several sizes, one whose first layer adds them once more, and one whose images are looked at as a whole.
KINDS = ("qwen2_vl", "qwen3_vl", "gemma3")
WIDE, HIGH = png("red", (48, 16)), png("blue", (16, 32))
PARTS = ({"type": "image", "image": WIDE}, text("What?"), {"type": "image", "image": HIGH}, text("And this?"))
WORDS = f"{IMAGE}What?{IMAGE}And this?:"


def seen(name: str, count: int = 16, parts: tuple[Any, ...] = PARTS, **sampling: Any) -> Any:
    return ask(name, chat(*parts)[1:], count, **sampling)


def plain(name: str, count: int) -> Any:
    return ask(name, chat(text("Tell"))[1:], count)


class Models:
    """Tiny models, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, tuple[Path, type[Processor]]] = {}
        self._said: dict[Any, list[int]] = {}

    def get(self, kind: str) -> tuple[Path, type[Processor]]:
        if kind not in self._made:
            directory = self._root / kind
            self._made[kind] = directory, save(kind, directory)
        return self._made[kind]

    def says(self, kind: str, words: str, images: tuple[bytes, ...], count: int) -> list[int]:
        """What `generate` makes of it."""
        key = (kind, words, images, count)
        if key not in self._said:
            self._said[key] = expected(*self.get(kind), words, list(images), count)
        return self._said[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("seeing"))


@pytest_asyncio.fixture
async def start(models: Models, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    workers = []

    async def begin(kind: str, **options: Any) -> tuple[ModelWorker, Answers, dict[str, Any]]:
        directory, processor = models.get(kind)
        monkeypatch.setitem(model_loader._PROCESSORS, "vision", processor)
        given = {"dtype": "float32", "device": "cpu", "prefill_chunk_tokens": 8, **options}
        worker = ModelWorker(TransformersOptions(model=str(directory), **given))
        worker.steps = answers = Answers()
        (info,) = await worker.load()
        workers.append(worker)
        return worker, answers, dict(info.details)

    yield begin
    for worker in workers:
        await worker.close()


def engine_of(worker: ModelWorker) -> Engine:
    assert worker._assembled is not None
    return worker._assembled.engine


async def joined(worker: ModelWorker, request: Any) -> None:
    """Have a request come between two steps, while the others stand still."""
    its, gate = engine_of(worker), threading.Event()
    its.run_job(gate.wait)
    worker.begin(request)
    await asyncio.to_thread(its._preparing.submit(lambda: None).result)
    gate.set()


class Log:
    """What the engine's thread does: pictures that are seen, and which rows a pass has so many tokens of."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        self.on_picture: Callable[[], None] = lambda: None
        see, forward = Vision.see, PagedRunner.forward

        def seeing(its: Vision, piece: Any, answer: Any) -> Any:
            self.done.append(answer.request.request_id)
            self.on_picture()
            return see(its, piece, answer)

        def computing(runner: PagedRunner, parts: Any, *others: Any) -> Any:
            self.done.append({part.answer.request.request_id: (part.length, len(part.tokens)) for part in parts})
            return forward(runner, parts, *others)

        patch.setattr(Vision, "see", seeing)
        patch.setattr(PagedRunner, "forward", computing)

    def passes(self, name: str) -> list[dict[str, tuple[int, int]]]:
        return [one for one in self.done if isinstance(one, dict) and name in one]


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_are_stepped_between_pictures_and_parts_of_their_prompt(
    kind: str, start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers, details = await start(kind)
    assert details["kv_cache"] == "paged"
    assert "pictures_at_once" not in details
    # A span may be longer than what is kept free before a window.
    assert ("kv_windows_kept_because" in details) is (kind == "gemma3")
    log = Log(monkeypatch)
    worker.begin(plain("text", 90))
    await answers.until("text", tokens=2)
    await joined(worker, seen("seen", n=2))
    await answers.until("text", "seen")
    assert not answers.errors
    assert answers.tokens("text") == models.says(kind, "Tell:", (), 90)
    wanted = models.says(kind, WORDS, (WIDE, HIGH), 16)
    assert answers.tokens("seen", 0) == answers.tokens("seen", 1) == wanted
    places = [place for place, one in enumerate(log.done) if one == "seen"]
    assert len(places) == 2
    assert any(isinstance(one, dict) and one.keys() == {"text"} for one in log.done[places[0] : places[1]])
    length = answers.last("seen").usage.prompt_tokens
    parts = [one for one in log.passes("seen") if one["seen"][0] <= length]
    assert len(parts) > 2
    assert all("text" in one for one in parts)
    span = 16 if kind == "gemma3" else 8
    assert max(one["seen"][1] for one in parts) == span


@pytest.mark.parametrize("kind", KINDS)
async def test_a_row_that_had_to_leave_is_seen_and_computed_again(
    kind: str, start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers, _ = await start(kind, kv_tokens_max=160)
    log = Log(monkeypatch)
    names = ("a", "b", "c")
    for name in names:
        worker.begin(seen(name, 40))
    await answers.until(*names)
    assert not answers.errors
    assert engine_of(worker).gauges["preemptions"] > 0
    assert sum(one in names for one in log.done if isinstance(one, str)) > 2 * len(names)
    for name in names:
        assert answers.tokens(name) == models.says(kind, WORDS, (WIDE, HIGH), 40)


async def test_the_same_pictures_share_blocks_and_others_do_not(start: Start, models: Models) -> None:
    worker, answers, _ = await start("qwen2_vl")
    further = (*PARTS, text(" More."))
    other = ({"type": "image", "image": png("green", (48, 16))}, *further[1:])
    for name, parts in (("first", PARTS), ("second", further), ("third", other)):
        worker.begin(seen(name, parts=parts))
        await answers.until(name)
    cached = [answers.last(name).usage.cached_tokens for name in ("first", "second", "third")]
    assert cached == [0, cached[1], 0]
    assert cached[1] >= 32
    assert answers.tokens("second") == models.says("qwen2_vl", f"{WORDS[:-1]} More.:", (WIDE, HIGH), 16)


async def test_tokens_that_see_later_ones_are_never_shared(start: Start, models: Models) -> None:
    worker, answers, _ = await start("gemma3")
    for name in ("first", "second"):
        worker.begin(seen(name))
        await answers.until(name)
    assert answers.last("second").usage.cached_tokens == 0
    assert answers.tokens("second") == answers.tokens("first") == models.says("gemma3", WORDS, (WIDE, HIGH), 16)


@pytest.mark.parametrize("when", ["seen", "computed"])
async def test_a_request_that_is_cancelled_in_the_middle_keeps_nothing(
    when: str, start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers, _ = await start("qwen2_vl")
    its, kept = engine_of(worker), []
    free = its.kv_tokens_free
    see, forward = Vision.see, PagedRunner.forward

    def seeing(sees: Vision, *args: Any) -> Any:
        found = see(sees, *args)
        kept.append(weakref.ref(found.pooler_output[0]))
        if when == "seen":
            its.abort("gone")
        return found

    def computing(runner: PagedRunner, parts: Any, *others: Any) -> Any:
        for part in parts:
            if part.embedded is not None:
                kept.append(weakref.ref(part.embedded.vectors))
                its.abort("gone")
        return forward(runner, parts, *others)

    monkeypatch.setattr(Vision, "see", seeing)
    monkeypatch.setattr(PagedRunner, "forward", computing)
    worker.begin(plain("text", 60))
    await answers.until("text", tokens=2)
    await joined(worker, seen("gone"))
    await answers.until("text")
    assert len(kept) == (1 if when == "seen" else 3)
    assert [one() for one in kept] == [None] * len(kept)
    assert answers.tokens("text") == models.says("qwen2_vl", "Tell:", (), 60)
    assert its.kv_tokens_free == free
    assert not answers.tokens("gone")


async def test_a_picture_that_cannot_be_seen_costs_its_request_alone(
    start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers, _ = await start("qwen2_vl")
    log = Log(monkeypatch)

    def broken() -> None:
        if log.done.count("bad") == 2:
            log.done.append("broken")
            raise ValueError("nothing to see")

    log.on_picture = broken
    worker.begin(plain("text", 60))
    await answers.until("text", tokens=2)
    await joined(worker, seen("bad"))
    await answers.until("bad")
    log.on_picture = lambda: None
    worker.begin(seen("good"))
    await answers.until("text", "good")
    assert "broken" in log.done
    assert answers.errors.keys() == {"bad"}
    assert type(answers.errors["bad"]) is BackendError
    assert answers.tokens("text") == models.says("qwen2_vl", "Tell:", (), 60)
    assert answers.tokens("good") == models.says("qwen2_vl", WORDS, (WIDE, HIGH), 16)


async def test_pictures_that_nobody_can_tell_apart_are_seen_at_once(
    start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vision._joined

    def wrong(found: Any) -> Any:
        made = real(found)
        made.pooler_output = [one * 2 for one in made.pooler_output]
        return made

    monkeypatch.setattr(vision, "_joined", wrong)
    worker, answers, details = await start("qwen2_vl")
    assert (details["kv_cache"], details["pictures_at_once"]) == ("paged", True)
    log = Log(monkeypatch)
    worker.begin(seen("seen"))
    await answers.until("seen")
    assert log.done.count("seen") == 1
    assert answers.tokens("seen") == models.says("qwen2_vl", WORDS, (WIDE, HIGH), 16)


async def test_a_model_that_answers_otherwise_in_parts_has_padded_rows_and_says_why(
    start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Vision.read

    def wrong(its: Vision, *args: Any) -> Any:
        found = read(its, *args)
        return found._replace(deep=[torch.zeros_like(layer) for layer in found.deep])

    monkeypatch.setattr(Vision, "read", wrong)
    worker, answers, details = await start("qwen3_vl")
    assert details["kv_cache"] == "padded"
    assert "pictures in parts" in details["kv_cache_padded_because"]
    worker.begin(plain("text", 60))
    await answers.until("text", tokens=2)
    worker.begin(seen("seen"))
    await answers.until("text", "seen")
    assert answers.tokens("seen") == models.says("qwen3_vl", WORDS, (WIDE, HIGH), 16)


async def test_drafts_follow_pictures(start: Start, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = models.says("qwen2_vl", WORDS, (WIDE, HIGH), 40)

    def half_right(proposer: NgramProposer, asked: Any) -> list[list[int]]:
        return [[*wanted[len(one.output) :][: min(count, 3)], 0][:count] for one, count in asked]

    monkeypatch.setattr(NgramProposer, "propose", half_right)
    worker, answers, _ = await start("qwen2_vl", speculation="ngram")
    worker.begin(seen("seen", 40))
    await answers.until("seen")
    gauges = engine_of(worker).gauges
    assert 0 < gauges["accepted_draft_tokens"] < gauges["draft_tokens"]
    assert answers.tokens("seen") == wanted


async def test_recorded_steps_ahead_of_the_host_know_the_places_after_pictures(
    start: Start, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "capture_of", lambda device: plain_capture)
    monkeypatch.setattr(engine, "_AHEAD", {"cpu"})
    played, forward = [], StepGraphs.forward

    def playing(graphs: StepGraphs, tokens: Any, lengths: Any, tables: Any, drawn: Any, shifts: Any) -> Any:
        found = forward(graphs, tokens, lengths, tables, drawn, shifts)
        played.append(found is not None and any(shifts))
        return found

    monkeypatch.setattr(StepGraphs, "forward", playing)
    worker, answers, _ = await start("qwen2_vl")
    worker.begin(plain("text", 60))
    worker.begin(seen("seen"))
    await answers.until("text", "seen")
    assert any(played)
    assert engine_of(worker).gauges["steps_ahead"] > 0
    assert answers.tokens("text") == models.says("qwen2_vl", "Tell:", (), 60)
    assert answers.tokens("seen") == models.says("qwen2_vl", WORDS, (WIDE, HIGH), 16)


async def test_a_prompt_with_pictures_is_told_of_token_by_token(start: Start) -> None:
    found = []
    for kind in ("paged", "padded"):
        worker, answers, _ = await start("qwen2_vl", kv_cache=kind)
        worker.begin(seen("seen", 2, prompt_logprobs=1))
        await answers.until("seen")
        told = [one for delta in answers.deltas["seen"] for one in delta.prompt_logprobs or ()]
        found.append([None if one is None else one.token.logprob for one in told])
    paged, padded = found
    assert len(paged) == answers.last("seen").usage.prompt_tokens
    assert paged[0] is padded[0] is None
    assert paged[1:] == pytest.approx(padded[1:], abs=1e-4)
