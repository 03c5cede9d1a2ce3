"""Frequencies that depend on a text's length: no neighbour, part or pause changes what `generate` makes of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.backends.test_embedding import vectors
from tests.backends.tiny import Answers, ask, byte_tokenizer
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError

SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.4, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
#: A text of this length is the longest with the first frequencies.
ORIGINAL = 24
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 3.0, 5.0, 2.0],
    "original_max_position_embeddings": ORIGINAL, "factor": 8.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 long": (
        "Phi3Config",
        {"rope_parameters": LONG, "max_position_embeddings": 192, "original_max_position_embeddings": ORIGINAL},
    ),
    "llama long": ("LlamaConfig", {"rope_parameters": LONG, "max_position_embeddings": 192}),
    "llama dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "qwen dynamic": ("Qwen2Config", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
}
#: Some short, some that grow beyond, some that are beyond at once, and both sides of the border.
PROMPTS = [
    "Hello",
    "x" * ORIGINAL,
    "The quick brown fox jumps over the lazy dog",
    "y" * (ORIGINAL - 1),
    "z" * (ORIGINAL + 1),
    "a",
]


def save(directory: Path, family: str) -> Path:
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **extra})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def generated(directory: Path, prompt: str, **settings: Any) -> list[int]:
    """What `generate` makes of a prompt, on a model that has seen no other.

    Phi3's drops the cache when a text grows beyond the border, and then computes the last token alone instead of all of
    them (seen with transformers 5.19), so there it goes without a cache.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt", return_token_type_ids=False)
    settings["use_cache"] = model.config.model_type != "phi3"
    output = model.generate(**inputs, do_sample=False, eos_token_id=None, pad_token_id=2, **settings)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


async def load(directory: Path, **options: Any) -> tuple[ModelWorker, Answers]:
    worker = ModelWorker(TransformersOptions(model=str(directory), dtype="float32", device="cpu", **options))
    worker.steps = answers = Answers()
    await worker.load()
    return worker, answers


@pytest.mark.parametrize("cells", [None, 160], ids=["at ease", "crowded"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_text_is_that_of_generate_in_any_company(family: str, cells: int | None, tmp_path: Path) -> None:
    directory = save(tmp_path, family)
    worker, answers = await load(directory, prefill_chunk_tokens=16, kv_tokens_max=cells)
    for prompt in PROMPTS:
        worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=30, ignore_eos=True))
        await answers.until(prompt, tokens=3)
    await answers.until(*PROMPTS)
    await worker.close()
    assert answers.largest_step > 1
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == generated(directory, prompt, max_new_tokens=30), prompt


@pytest.mark.parametrize("family", FAMILIES)
async def test_beams_and_continuations_turn_alike(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path, family)
    worker, answers = await load(directory, prefill_chunk_tokens=16)
    expected = generated(directory, "Hello", max_new_tokens=40)
    worker.begin(ask("beams", "Hello", use_beam_search=True, n=1, best_of=3, max_new_tokens=30, ignore_eos=True))
    known = expected[:25]
    worker.begin(ask("rest", "Hello", temperature=0, max_new_tokens=40, ignore_eos=True, resume_token_ids=known))
    await answers.until("beams", "rest")
    await worker.close()
    assert known + answers.tokens("rest") == expected
    assert answers.tokens("beams") == generated(directory, "Hello", max_new_tokens=30, num_beams=3)


async def test_vectors_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    worker, _ = await load(save(tmp_path, "llama long"))
    alone = [(await vectors(worker, text))[0] for text in PROMPTS]
    together = await vectors(worker, *PROMPTS)
    await worker.close()
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


async def test_frequencies_that_are_not_served_are_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, "llama long")
    with pytest.raises(ConfigurationError, match="frequencies"):
        await load(directory, compile=True)
    model = torch.nn.Module()
    model.rotary = torch.nn.Module()
    model.rotary.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}
    with pytest.raises(ConfigurationError, match="kind of layer"):
        Ropes(model)
