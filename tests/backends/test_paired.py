"""Encoder-decoder models: a tiny T5 in a running batch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from tests.backends.test_engine import hold, prepared
from tests.backends.tiny import Answers, ask, byte_tokenizer
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.runner.encoder_decoder import EncoderDecoderRunner
from zfabric.backends.hf_transformers.runner.input_batch import InputBatch
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, ContextOverflowError
from zfabric.wire.tasks import EmbedRequest

Served = tuple[ModelWorker, Answers]
PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "Once upon a time"]


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random T5."""
    directory = tmp_path_factory.mktemp("tiny-t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        tie_word_embeddings=False, initializer_factor=20.0, decoder_start_token_id=2, eos_token_id=1, pad_token_id=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest_asyncio.fixture
async def served(tiny_t5: Path) -> AsyncIterator[Served]:
    worker = ModelWorker(TransformersOptions(model=str(tiny_t5), dtype="float32", device="cpu", context_length=200))
    worker.steps = answers = Answers()
    await worker.load()
    yield worker, answers
    await worker.close()


def expected(directory: Path, prompt: str, count: int) -> list[int]:
    """What transformers' own generate makes of a prompt alone, greedily."""
    tokenizer = byte_tokenizer()
    model = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, 1:].tolist()
    return tokens


def greedy(name: str, prompt: str, count: int, **more: Any) -> Any:
    return ask(name, prompt, temperature=0, max_new_tokens=count, ignore_eos=True, **more)


async def test_a_batch_says_what_generate_says_one_by_one(served: Served, tiny_t5: Path) -> None:
    worker, answers = served
    for index, prompt in enumerate(PROMPTS):
        worker.begin(greedy(prompt, prompt, 16 + 5 * index))
        await answers.until(prompt, tokens=3)
    await answers.until(*PROMPTS)
    assert answers.largest_step > 1
    for index, prompt in enumerate(PROMPTS):
        assert answers.tokens(prompt) == expected(tiny_t5, prompt, 16 + 5 * index)
        usage = answers.last(prompt).usage
        assert usage is not None
        assert usage.prompt_tokens == len(prompt)
    assert len({tuple(answers.tokens(prompt)[:16]) for prompt in PROMPTS}) == len(PROMPTS)


async def test_sources_that_come_together_are_read_together(served: Served, tiny_t5: Path) -> None:
    worker, answers = served
    gate = hold(worker)
    for prompt in PROMPTS:
        worker.begin(greedy(prompt, prompt, 8, n=2))
    await prepared(worker)
    gate.set()
    await answers.until(*PROMPTS)
    for prompt in PROMPTS:
        assert answers.tokens(prompt, 0) == answers.tokens(prompt, 1) == expected(tiny_t5, prompt, 8)
    assert worker.load_report().gauges["kv_tokens_free"] > 0


async def test_a_full_cache_changes_no_text(tiny_t5: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_t5), dtype="float32", device="cpu", kv_tokens_max=120))
    worker.steps = answers = Answers()
    await worker.load()
    for prompt in PROMPTS:
        worker.begin(greedy(prompt, prompt, 30))
    await answers.until(*PROMPTS)
    await worker.close()
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == expected(tiny_t5, prompt, 30)


async def test_a_continuation_says_the_rest(served: Served) -> None:
    worker, answers = served
    worker.begin(ask("whole", seed=3, max_new_tokens=12, ignore_eos=True))
    await answers.until("whole")
    tokens = answers.tokens("whole")
    worker.begin(ask("rest", seed=3, max_new_tokens=12, ignore_eos=True, resume_token_ids=tokens[:5]))
    await answers.until("rest")
    assert answers.tokens("rest") == tokens[5:]


async def test_what_it_cannot_do_is_refused(served: Served) -> None:
    worker, answers = served
    (info,) = worker._models()
    assert "prompt_logprobs" not in (info.parameters or ())
    assert {"generate", "embed", "resume"} <= set(info.capabilities)
    worker.begin(ask("long", "x" * 300))
    worker.begin(ask("fits", "x" * 200, max_new_tokens=2, ignore_eos=True, echo=True))
    await answers.until("long", "fits")
    assert isinstance(answers.errors["long"], ContextOverflowError)
    assert answers.text("fits").startswith("x" * 200)


async def test_the_encoder_embeds(served: Served) -> None:
    worker, _ = served
    result = await worker.embed(EmbedRequest(inputs=["hello", "a longer text beside it"]))
    together = np.frombuffer(result.data, dtype="<f4").reshape(2, 32)
    alone = np.frombuffer((await worker.embed(EmbedRequest(inputs=["hello"]))).data, dtype="<f4")
    np.testing.assert_allclose(alone, together[0], atol=1e-5)


async def test_compiling_it_is_refused(tiny_t5: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_t5), dtype="float32", device="cpu", compile=True))
    worker.steps = Answers()
    with pytest.raises(ConfigurationError, match="causal"):
        await worker.load()
    await worker.close()


async def test_streams_wait_for_one_text_that_is_longer_than_a_part(
    tiny_t5: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = served
    done: list[int] = []
    encode, step = EncoderDecoderRunner._encode, InputBatch.forward

    def encoding(model: EncoderDecoderRunner, sources: Any, adapters: Any) -> Any:
        done.extend(map(len, sources))
        return encode(model, sources, adapters)

    def stepping(batch: InputBatch) -> Any:
        done.append(0)
        return step(batch)

    worker.begin(greedy("running", "Hello", 150))
    await answers.until("running", tokens=2)
    gate = hold(worker)
    monkeypatch.setattr(EncoderDecoderRunner, "_encode", encoding)
    monkeypatch.setattr(InputBatch, "forward", stepping)
    texts = {"short": "x" * 10, "shorter": "x" * 9, "long": "y" * 190, "longer": "z" * 195}
    for name, words in texts.items():
        worker.begin(greedy(name, words, 12))
    await prepared(worker)
    gate.set()
    await answers.until("running", *texts)
    # Short ones go together; of those that no part has room for, each has a turn of its own.
    assert [one for one in done if one] == [10, 9, 190, 195]
    first, second, third = (done.index(length) for length in (9, 190, 195))
    assert done[first:second] == [9, 0]
    assert done[second:third] == [190, 0]
    for name, words in texts.items():
        assert answers.tokens(name) == expected(tiny_t5, words, 12)
