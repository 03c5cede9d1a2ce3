"""Families of models that differ in what a batch has to get right: positions, masks, windows, heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.backends.tiny import Answers, ask, byte_tokenizer, reference
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError

SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "tie_word_embeddings": False, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "GPTNeoXConfig": {"max_position_embeddings": 256, "initializer_range": 1.0},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "init_std": 0.4},
    "BloomConfig": {"n_layer": 2, "n_head": 4},
    "FalconConfig": {"max_position_embeddings": 256},
    "MistralConfig": {**GROUPED, "sliding_window": 12},
    "Qwen2Config": {**GROUPED},
    "Qwen3Config": {**GROUPED},
    "Gemma3TextConfig": {**GROUPED, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "PhiConfig": {},
    "Phi3Config": {"num_key_value_heads": 2},
    "MixtralConfig": {"num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3MoeConfig": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "Once upon"]


def save(directory: Path, family: str, extra: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, family)(**{**SIZES, **extra})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
async def test_each_family_says_in_a_batch_what_it_says_alone(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path, family, FAMILIES[family])
    worker = ModelWorker(
        TransformersOptions(model=str(directory), dtype="float32", device="cpu", prefill_chunk_tokens=16)
    )
    worker.steps = answers = Answers()
    await worker.load()
    for prompt in PROMPTS:
        worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=24, ignore_eos=True))
        await answers.until(prompt, tokens=3)
    await answers.until(*PROMPTS)
    await worker.close()
    assert answers.largest_step > 1
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == reference(directory, prompt, 24)
        assert len(set(answers.tokens(prompt))) > 3


async def test_a_family_that_cannot_be_batched_is_refused(tmp_path: Path) -> None:
    transformers.RwkvConfig(**SIZES).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="type 'rwkv', whose code in transformers mixes the rows"):
        await ModelWorker(TransformersOptions(model=str(tmp_path), device="cpu")).load()
