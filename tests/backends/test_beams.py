"""Beam search says what that of transformers says, beside running streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.test_engine import Served, Start, greedy, hold, prepared, start
from tests.backends.test_paired import tiny_t5
from tests.backends.tiny import Answers, ask, reference
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedParameterError

__all__ = ["start", "tiny_t5"]  # fixtures


def expected(directory: Path, prompt: str, beams: int, given: int, **options: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, num_beams=beams, num_return_sequences=given, do_sample=False, pad_token_id=2, **options
    )  # fmt: skip
    tokens: list[list[int]] = output[:, ids.shape[1] :].tolist()
    # What ended early is padded.
    return [line[: line.index(2)] if 2 in line else line for line in tokens]


async def search(served: Served, name: str, prompt: str, **sampling: Any) -> list[list[int]]:
    worker, answers = served
    worker.begin(ask(name, prompt, use_beam_search=True, **sampling))
    await answers.until(name)
    if name in answers.errors:
        raise answers.errors[name]
    return [answers.tokens(name, index) for index in range(sampling.get("n", 1))]


@pytest.mark.parametrize("prompt", ["Hello", "The quick brown fox", "a", "Once upon a time"])
@pytest.mark.parametrize(("beams", "given"), [(2, 1), (4, 3)])
async def test_searches_find_what_transformers_finds(
    tiny_worker: Served, tiny_llama: Path, prompt: str, beams: int, given: int
) -> None:
    # An end that is likely: answers of different lengths compete.
    for ends in ([1], [1, 60, 70, 80, 90, 100, 110, 120, 130]):
        found = await search(
            tiny_worker, f"{ends}", prompt, n=given, best_of=beams, max_new_tokens=20, stop_token_ids=tuple(ends)
        )
        assert found == expected(tiny_llama, prompt, beams, given, max_new_tokens=20, eos_token_id=ends)


async def test_penalties_count_in_a_search(tiny_worker: Served, tiny_llama: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "repetition_penalty": 5.0}
    found = await search(tiny_worker, "a", "Hello", best_of=3, ignore_eos=True, **options)
    assert found == expected(tiny_llama, "Hello", 3, 1, eos_token_id=None, **options)
    assert found != await search(tiny_worker, "b", "Hello", best_of=3, ignore_eos=True, max_new_tokens=20)


async def test_streams_go_on_beside_a_search(tiny_worker: Served, tiny_llama: Path) -> None:
    worker, answers = tiny_worker
    worker.begin(greedy("stream", "a", 60))
    await answers.until("stream", tokens=2)
    found = await search(tiny_worker, "b", "Hello" * 20, best_of=2, max_new_tokens=10, ignore_eos=True)
    assert found == expected(tiny_llama, "Hello" * 20, 2, 1, max_new_tokens=10, eos_token_id=None)
    await answers.until("stream")
    assert answers.tokens("stream") == reference(tiny_llama, "a", 60)


async def test_stop_strings_and_echo_apply_to_what_is_found(tiny_worker: Served) -> None:
    _, answers = tiny_worker
    await search(tiny_worker, "free", "Hello", best_of=2, max_new_tokens=30, ignore_eos=True)
    free = answers.text("free")
    stop = free[5:8]
    await search(
        tiny_worker, "cut", "Hello", best_of=2, max_new_tokens=30, ignore_eos=True, stop=(stop,), echo=True
    )  # fmt: skip
    assert answers.text("cut") == "Hello" + free[: free.index(stop)]
    assert answers.last("cut").finish_reason == "stop"
    usage = answers.last("cut").usage
    assert usage is not None
    assert usage.completion_tokens == len(answers.tokens("cut"))


async def test_a_search_waits_for_room_and_can_be_dropped(start: Start, tiny_llama: Path) -> None:
    worker, answers = await start(kv_tokens_max=150)
    gate = hold(worker)
    names = ["Hello", "a", "Once upon"]
    for name in names:
        worker.begin(greedy(name, name, 50))
    worker.begin(ask("search", "Hello", use_beam_search=True, best_of=2, max_new_tokens=40, ignore_eos=True))
    worker.begin(ask("dropped", "Hello", use_beam_search=True, best_of=2, max_new_tokens=40, ignore_eos=True))
    worker.begin(ask("large", "Hello", use_beam_search=True, best_of=2, max_new_tokens=140, ignore_eos=True))
    await prepared(worker)
    worker.abort("dropped")
    gate.set()
    await answers.until("search", "large", *names)
    assert isinstance(answers.errors["large"], RequestError)
    assert "dropped" not in answers.deltas
    assert answers.tokens("search") == expected(tiny_llama, "Hello", 2, 1, max_new_tokens=40, eos_token_id=None)[0]
    for name in names:
        assert answers.tokens(name) == reference(tiny_llama, name, 50)


async def test_what_a_search_cannot_honour_is_refused_by_name(tiny_worker: Served) -> None:
    refused: dict[str, Any] = {"top_k": 5, "top_p": 0.5, "logprobs": 1, "guided_regex": "x"}
    for name, value in refused.items():
        with pytest.raises(UnsupportedParameterError, match=name):
            await search(tiny_worker, name, "x", best_of=2, **{name: value})
    with pytest.raises(ParameterRangeError, match="best_of"):
        await search(tiny_worker, "single", "x")


async def test_encoder_decoders_search_as_well(tiny_t5: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    worker = ModelWorker(TransformersOptions(model=str(tiny_t5), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    found = await search((worker, answers), "a", "Hello", best_of=3, n=2, max_new_tokens=12, ignore_eos=True)
    await worker.close()
    ids = AutoTokenizer.from_pretrained(tiny_t5)("Hello", return_tensors="pt")["input_ids"]
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5, dtype=torch.float32)
    output = model.generate(
        input_ids=ids, num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=12, eos_token_id=None,
        pad_token_id=2,
    )  # fmt: skip
    assert found == output[:, 1:].tolist()
