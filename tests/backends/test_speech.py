"""Speech written down: a tiny Whisper in a running batch, as `generate` does it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from tests.backends.speaking import save_whisper, transcribed
from tests.backends.test_engine import hold, prepared
from tests.backends.tiny import Answers, ask
from tests.voices import RATE, voice, wav
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.input_batch import InputBatch
from zfabric.backends.hf_transformers.runner.speech import SpeechRunner
from zfabric.backends.hf_transformers.scheduling.engine import Engine
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ParameterRangeError, RequestError
from zfabric.sounds import samples_of
from zfabric.wire.payloads import GenerateRequest

Served = tuple[ModelWorker, Answers]


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("tiny-whisper"))


@pytest_asyncio.fixture
async def served(tiny_whisper: Path) -> AsyncIterator[Served]:
    worker = ModelWorker(TransformersOptions(model=str(tiny_whisper), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    yield worker, answers
    await worker.close()


def said(name: str, data: Any, *texts: str, extra: dict[str, Any] | None = None, **sampling: Any) -> GenerateRequest:
    request = ask(name, **{"temperature": 0, **sampling})
    parts: list[dict[str, Any]] = [{"type": "audio", "audio": data}, *({"type": "text", "text": one} for one in texts)]
    request.prompt, request.messages, request.extra = None, [{"role": "user", "content": parts}], extra or {}
    return request


def as_heard(samples: np.ndarray) -> np.ndarray:
    """What 16 bits leave of samples."""
    return samples_of(wav(samples), RATE, 2)


async def test_voices_in_a_batch_are_written_down_as_alone(served: Served, tiny_whisper: Path) -> None:
    worker, answers = served
    english = {"language": "en"}
    voices = {f"{seed}": voice(seed, 0.5 + seed / 4) for seed in range(5)}
    for name, samples in voices.items():
        # As long as the model says that its answers may be, beside what they begin with.
        worker.begin(said(name, wav(samples), extra=english, unset=["max_new_tokens"]))
        await answers.until(name, tokens=2)
    worker.begin(said("twice", wav(voices["0"]), extra=english, n=2, max_new_tokens=7))
    worker.begin(said("beams", wav(voices["1"]), extra=english, use_beam_search=True, best_of=3, max_new_tokens=9))
    await answers.until(*voices, "twice", "beams")
    assert not answers.errors
    assert answers.largest_step > 1
    wanted = {name: transcribed(tiny_whisper, as_heard(samples), language="en") for name, samples in voices.items()}
    ends = {name: [token for token in answers.tokens(name) if token != 1] for name in voices}
    assert ends == {name: [token for token in tokens if token != 1] for name, tokens in wanted.items()}
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(wanted)
    assert answers.tokens("twice", 0) == answers.tokens("twice", 1) == answers.tokens("0")[:7]
    beams = transcribed(tiny_whisper, as_heard(voices["1"]), language="en", num_beams=3, max_new_tokens=9)
    assert answers.tokens("beams") == beams
    usage = answers.last("0").usage
    assert usage is not None
    assert usage.prompt_tokens == 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "de"},
        {"language": "German"},
        {"language": "<|fr|>", "task": "translate"},
        {"task": "translate"},
    ],
)
async def test_it_is_told_language_and_task_as_generate_is(
    served: Served, tiny_whisper: Path, options: dict[str, Any]
) -> None:
    worker, answers = served
    # One whose language is found out as another one than the first.
    samples = voice(3)
    worker.begin(said("a", wav(samples), extra=options, max_new_tokens=12))
    worker.begin(said("b", wav(samples), "As was said before", extra=options, max_new_tokens=12))
    await answers.until("a", "b")
    assert not answers.errors
    alone = as_heard(samples)
    assert answers.tokens("a") == transcribed(tiny_whisper, alone, max_new_tokens=12, **options)
    prompted = transcribed(tiny_whisper, alone, "As was said before", max_new_tokens=12, **options)
    assert answers.tokens("b") == prompted != answers.tokens("a")


class Log:
    """What the engine's thread does: how many sounds it hears at once, and steps of running rows, as 0."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[int] = []
        hear, step = SpeechRunner.hear, InputBatch.forward

        def hearing(model: SpeechRunner, features: Any) -> Any:
            self.done.append(len(features))
            return hear(model, features)

        def stepping(batch: InputBatch) -> Any:
            self.done.append(0)
            return step(batch)

        patch.setattr(SpeechRunner, "hear", hearing)
        patch.setattr(InputBatch, "forward", stepping)


async def test_sounds_that_come_together_are_heard_together(
    served: Served, tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = served
    log, gate = Log(monkeypatch), hold(worker)
    voices = {f"{seed}": voice(seed, 0.5 + seed / 4) for seed in range(4)}
    for name, samples in voices.items():
        before = ["said before"] * (name == "2")
        worker.begin(said(name, wav(samples), *before, extra={"language": "en"}, unset=["max_new_tokens"]))
    await prepared(worker)
    gate.set()
    await answers.until(*voices)
    assert [one for one in log.done if one] == [4]
    for name, samples in voices.items():
        before = ["said before"] * (name == "2")
        wanted = transcribed(tiny_whisper, as_heard(samples), *before, language="en")
        found = answers.tokens(name)
        assert [token for token in found if token != 1] == [token for token in wanted if token != 1]


async def test_streams_wait_for_one_pass_of_the_encoder_at_a_time(
    served: Served, tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = served
    assert worker._assembled is not None
    asked, run = threading.Event(), Engine._run_encoder

    def asking(engine: Engine, job: Any) -> Any:
        future = run(engine, job)
        asked.set()
        return future

    worker.begin(said("running", wav(voice(1)), extra={"language": "en"}, max_new_tokens=50, ignore_eos=True))
    await answers.until("running", tokens=2)
    gate = hold(worker)
    monkeypatch.setattr(Engine, "_run_encoder", asking)
    worker._assembled.engine._input_processor.run_by(worker._assembled.engine._run_encoder)
    log = Log(monkeypatch)
    worker.begin(said("told", wav(voice(2)), extra={"language": "de"}, max_new_tokens=8))
    # Its language is found out first, for which it is heard.
    worker.begin(said("untold", wav(voice(3)), max_new_tokens=8))
    await asyncio.to_thread(asked.wait)
    gate.set()
    await answers.until("running", "told", "untold")
    places = [place for place, one in enumerate(log.done) if one]
    assert [log.done[place] for place in places] == [1, 1]
    assert 0 in log.done[places[0] : places[1]]
    assert answers.tokens("told") == transcribed(tiny_whisper, as_heard(voice(2)), language="de", max_new_tokens=8)
    assert answers.tokens("untold") == transcribed(tiny_whisper, as_heard(voice(3)), max_new_tokens=8)


async def test_a_continuation_says_the_rest(served: Served) -> None:
    worker, answers = served
    worker.begin(said("whole", wav(voice(1)), temperature=1, seed=3, max_new_tokens=12, ignore_eos=True))
    await answers.until("whole")
    tokens = answers.tokens("whole")
    rest = said("rest", wav(voice(1)), temperature=1, seed=3, max_new_tokens=12, ignore_eos=True)
    rest.resume_token_ids = tokens[:5]
    worker.begin(rest)
    await answers.until("rest")
    assert answers.tokens("rest") == tokens[5:]


async def test_what_cannot_be_heard_is_refused_by_value(served: Served) -> None:
    worker, answers = served
    (info,) = worker._models()
    assert {"generate", "chat", "multimodal"} <= set(info.capabilities)
    assert not {"embed", "score"} & set(info.capabilities)
    assert {"language", "task"} <= set(info.extra or ())
    assert info.context_length == 64
    two = said("two", wav(voice(1)))
    assert two.messages is not None
    two.messages[0]["content"] *= 2
    requests = {
        "long": said("long", wav(voice(1, 2.5))),
        "klingon": said("klingon", wav(voice(1)), extra={"language": "klingon"}),
        "mp3": said("mp3", b"ID3\x03 no WAV"),
        "address": said("address", "http://127.0.0.1/a.wav"),
        "empty": said("empty", wav(np.zeros(0))),
        "text": ask("text"),
        "two": two,
    }
    for request in requests.values():
        worker.begin(request)
    await answers.until(*requests)
    assert set(answers.errors) == set(requests)
    assert all(isinstance(error, RequestError) for error in answers.errors.values())
    assert "2.50 s, at most 2 s are heard" in str(answers.errors["long"])
    assert isinstance(answers.errors["klingon"], ParameterRangeError)
    assert "de, en, fr" in str(answers.errors["klingon"])
