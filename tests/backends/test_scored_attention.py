"""Caps of scores and sinks: what a model says is what its own code computes step by step, over pages, padded, and in steps that
are recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.test_architectures import PROMPTS, SIZES, save
from tests.backends.test_engine import Start, greedy, starting
from tests.backends.test_paged import CAPPED, HISTORY, SINKS
from tests.backends.test_step_graphs import compared, runner_of
from zfabric.backends.hf_transformers.cache.scored_attention import Scoring, scored_attention, scoring_of
from zfabric.backends.hf_transformers.runner.step_graphs import StepGraphs, plain

KINDS = [("GptOssConfig", SINKS), ("Gemma2Config", CAPPED)]
TEXTS = [*PROMPTS, HISTORY]


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "auto") as start_one:
        yield start_one


def alone(directory: Path, text: str, count: int) -> list[int]:
    """What `generate` says with transformers' own attention, whose scores are made step by step."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(("family", "extra"), KINDS)
@pytest.mark.parametrize("kv_cache", ["paged", "padded"])
async def test_texts_are_those_of_the_models_own_attention(
    family: str, extra: dict[str, Any], kv_cache: str, tmp_path: Path, start: Start
) -> None:
    """Prompts in parts, rows that join and leave, and windows."""
    directory = save(tmp_path, family, {**SIZES, **extra})
    worker, answers = await start(model=str(directory), kv_cache=kv_cache, prefill_chunk_tokens=16)
    for text in TEXTS:
        worker.begin(greedy(text, text, 24))
        await answers.until(text, tokens=3)
    await answers.until(*TEXTS)
    assert answers.largest_step > 1
    for text in TEXTS:
        assert answers.tokens(text) == alone(directory, text, 24)


def test_a_cap_changes_what_is_said(tmp_path: Path) -> None:
    """So texts that are equal say that it was there."""
    capped = save(tmp_path / "capped", "Gemma2Config", {**SIZES, **CAPPED})
    not_capped = save(tmp_path / "not", "Gemma2Config", {**SIZES, **CAPPED, "attn_logit_softcapping": None})
    assert alone(capped, HISTORY, 24) != alone(not_capped, HISTORY, 24)


@pytest.mark.parametrize(("family", "extra"), KINDS)
def test_recorded_steps_answer_as_the_ordinary_pass(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    directory = save(tmp_path, family, {**SIZES, **extra})
    compared(directory, "cpu", torch.float32)
    runner = runner_of(directory, "meta", torch.bfloat16)
    with torch.inference_mode():
        graphs = StepGraphs(runner.model, runner.cache, rows_max=2, length_max=4, capture=plain)
        graphs.record()
    assert graphs.sizes == [(1, 1), (2, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "extra"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_plays_what_the_ordinary_pass_computes(
    family: str, extra: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    compared(save(tmp_path, family, {**SIZES, **extra}), "cuda", getattr(torch, dtype))


@pytest.mark.parametrize("causal", [True, False])
def test_scores_are_changed_as_they_are_meant(causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    sinks = torch.randn(4)
    found = scored_attention(query, key, value, None, 0.3, Scoring(1.5, sinks), causal=causal)
    for row in range(2):
        for head in range(4):
            for column in range(3):
                seen = 5 - 2 + column if causal else 5
                scores = torch.tanh(key[row, head // 2, :seen] @ query[row, head, column] * 0.3 / 1.5) * 1.5
                weights = torch.cat([scores, sinks[head : head + 1]]).softmax(dim=0)[:-1]
                torch.testing.assert_close(found[row, column, head], weights @ value[row, head // 2, :seen])
    assert scoring_of({"softcap": None, "s_aux": None}) is None
    assert scoring_of({"s_aux": sinks}) == Scoring(None, sinks)
