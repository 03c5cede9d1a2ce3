"""What a model says of its answers holds where a request does not, as with `generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from zfabric import AsyncClient, Completion, ModelInfo, SamplingParams
from zfabric.backends.front.generation_config import read
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.testing import serving
from zfabric.wire.sampling import UNSETTABLE, SamplingOptions

PROMPT = "The quick brown fox"


def model_with(directory: Path, source: Path, **config: Any) -> Path:
    """A copy of a model that has this generation_config.json."""
    shutil.copytree(source, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 2, **config}))
    return directory


def generated(directory: Path, **arguments: Any) -> list[int]:
    """Tokens of `generate` with the model's own settings."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, **arguments)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def worker(directory: Path, **options: Any) -> ModelWorker:
    return ModelWorker(
        TransformersOptions(model=str(directory), model_names=("m",), dtype="float32", device="cpu", **options)
    )


@pytest.mark.parametrize(
    "config",
    [
        {"repetition_penalty": 1.7, "max_new_tokens": 24},
        {"max_length": 40},
        {"min_length": 60, "max_length": 70},
        {"min_new_tokens": 30, "max_new_tokens": 31},
        {"do_sample": True, "top_k": 1, "max_new_tokens": 20},
        {"do_sample": True, "min_p": 1.0, "temperature": 0.3, "max_new_tokens": 20},
        {"do_sample": False, "max_new_tokens": 20},
    ],
)
async def test_the_text_is_that_of_generate(tmp_path: Path, tiny_llama: Path, config: dict[str, Any]) -> None:
    draws = {} if "do_sample" in config else {"do_sample": False}
    directory = model_with(tmp_path / "m", tiny_llama, **draws, **config)
    wanted = generated(directory)
    async with serving(worker(directory)) as client:
        assert (await client.generate("m", PROMPT)).token_ids == wanted


async def test_tokens_and_words_that_the_model_bans_do_not_come(tmp_path: Path, tiny_llama: Path) -> None:
    free = generated(model_with(tmp_path / "free", tiny_llama, do_sample=False), max_new_tokens=12)
    banned = {"suppress_tokens": [free[1]], "begin_suppress_tokens": [free[0]], "bad_words_ids": [[free[4]], free[5:7]]}
    directory = model_with(tmp_path / "m", tiny_llama, do_sample=False, max_new_tokens=12, **banned)
    wanted = generated(directory)
    assert wanted != free
    async with serving(worker(directory)) as client:
        assert (await client.generate("m", PROMPT)).token_ids == wanted


async def test_what_a_request_says_holds_whatever_the_model_says(tmp_path: Path, tiny_llama: Path) -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.1, "repetition_penalty": 1.5, "max_new_tokens": 7}
    directory = model_with(tmp_path / "m", tiny_llama, **config)
    neutral: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 12,
        "seed": 3,
    }

    async def both(client: AsyncClient) -> list[Completion]:
        return [await client.generate("m", PROMPT, seed=3), await client.generate("m", PROMPT, **neutral)]

    async with serving(worker(directory)) as client:
        status = await client.model_details("m")
        own, said = await both(client)
    assert status.defaults == {key: value for key, value in config.items() if key != "do_sample"}
    assert (len(own.token_ids), len(said.token_ids)) == (7, 12)
    async with serving(worker(directory, generation_config="none")) as client:
        assert (await client.model_details("m")).defaults == {}
        unset, again = await both(client)
    assert again.token_ids == said.token_ids
    assert unset.token_ids[:12] == said.token_ids
    (tmp_path / "other").mkdir()
    shutil.copy(directory / "generation_config.json", tmp_path / "other")
    async with serving(worker(tiny_llama, generation_config=str(tmp_path / "other"))) as client:
        assert (await both(client))[0].token_ids == own.token_ids


async def test_a_model_that_is_greedy_by_itself_needs_no_seed(tmp_path: Path, tiny_llama: Path) -> None:
    directory = model_with(tmp_path / "m", tiny_llama, do_sample=False, max_new_tokens=9)
    async with serving(worker(directory)) as client:
        texts = {(await client.generate("m", PROMPT)).text for _ in range(3)}
        searched = await client.generate("m", PROMPT, n=2, use_beam_search=True)
    assert len(texts) == 1
    assert len(searched.choices) == 2


def test_what_is_read() -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=0, typical_p=0.9, repetition_penalty=1.05, eos_token_id=[1, 2],
        max_length=99, suppress_tokens=[3], begin_suppress_tokens=[4, 5], bad_words_ids=[[6], [7, 8]], num_beams=4,
        no_repeat_ngram_size=3,
    ).to_diff_dict()  # fmt: skip
    found = read(config, UNSETTABLE)
    assert found.parameters == {"temperature": 0.6, "top_k": -1, "typical_p": 0.9, "repetition_penalty": 1.05}
    assert (found.max_length, found.min_length) == (99, 0)
    assert (found.suppressed, found.suppressed_first) == (frozenset([3]), frozenset([4, 5]))
    assert found.bad_words == ((6,), (7, 8))
    assert found.not_done == ("num_beams", "no_repeat_ngram_size")
    assert read(config, ["temperature"]).parameters == {"temperature": 0.6}
    assert read({"temperature": -1, "top_p": "x", "top_k": True, "max_new_tokens": None}, UNSETTABLE).parameters == {}
    assert read(GenerationConfig().to_diff_dict(), UNSETTABLE) == read({}, UNSETTABLE)


def test_unset_is_not_the_same_as_neutral() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7}
    assert SamplingOptions().resolved({}) == SamplingParams(unset=UNSETTABLE)
    said = SamplingOptions(temperature=1.0, max_new_tokens=0, seed=5).resolved(defaults)
    assert (said.temperature, said.top_p, said.max_new_tokens, said.seed) == (1.0, 0.9, None, 5)
    assert set(UNSETTABLE) - set(said.unset) == {"temperature", "top_p", "max_new_tokens"}
    beams = SamplingOptions(use_beam_search=True, n=2).resolved(defaults)
    assert (beams.top_p, beams.max_new_tokens) == (1.0, 7)
    assert ModelInfo(name="m").defaults == {}
