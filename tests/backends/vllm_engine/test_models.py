"""Vectors, classes and scores of pooling models, and SmolLM2: real engines on real and tiny models."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from tests.backends.test_sentences import PASSAGES, RECORDED, TEXTS, checkpoint, load
from tests.backends.tiny import Answers, byte_tokenizer
from tests.backends.vllm_engine.conftest import ENGINE
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import (
    ContextOverflowError,
    ParameterRangeError,
    RequestError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingParams
from zfabric.wire.tasks import ClassifyRequest, EmbedRequest, EmbedTokensRequest, RewardRequest, ScoreRequest


@contextlib.asynccontextmanager
async def loaded(*argv: str) -> AsyncIterator[tuple[VLLMWorker, Answers, Any]]:
    """A worker, the sink that it emits to, and what it tells of its model."""
    worker = VLLMWorker([*argv, *ENGINE])
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    try:
        yield worker, answers, info
    finally:
        await worker.close()


async def test_minilm_embeds(minilm: Path) -> None:
    async with loaded("--model", str(minilm), "--runner", "pooling", "--dtype", "float32") as (worker, _, info):
        assert sorted(info.capabilities) == ["count_tokens", "detokenize", "embed", "embed_tokens", "score", "tokenize"]
        assert info.dimensions == 384
        texts = ["a cat", "a kitten", "quarterly revenue", "the quick brown fox jumps over the lazy dog"]

        async def vectors(*inputs: Any, **options: Any) -> np.ndarray[Any, Any]:
            result = await worker.embed(EmbedRequest(inputs=list(inputs), request_id="e", **options))
            return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)

        together = await vectors(*texts)
        assert together.shape == (4, 384)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert together[0] @ together[1] > 0.5 > together[0] @ together[2]
        for index, text in enumerate(texts):
            np.testing.assert_allclose((await vectors(text))[0], together[index], atol=1e-4)
        tokens = AutoTokenizer.from_pretrained(minilm)("a cat")["input_ids"]
        np.testing.assert_allclose((await vectors(tokens))[0], together[0], atol=1e-5)
        raw = (await vectors("a cat", normalize=False))[0]
        assert np.linalg.norm(raw) != pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(raw / np.linalg.norm(raw), together[0], atol=1e-4)
        short = (await vectors("a cat", dimensions=64))[0]
        np.testing.assert_allclose(short, raw[:64] / np.linalg.norm(raw[:64]), atol=1e-4)
        assert await worker.score(ScoreRequest(query="a cat", documents=texts[1:3])) == pytest.approx(
            [float(together[0] @ other) for other in together[1:3]], abs=1e-4
        )
        await _token_vectors_are_hidden_states(worker, minilm)
        await _refuses(worker, vectors)


async def test_vectors_are_those_of_sentence_transformers_and_of_transformers_here(
    minilm: Path, tmp_path: Path
) -> None:
    directory = checkpoint(tmp_path / "model", minilm, "prompted")
    chunked = EmbedRequest(inputs=[TEXTS[2], "a cat"], request_id="chunks", truncate="chunk")
    other, _ = await load(directory)
    expected = await other.embed(chunked)
    await other.close()
    async with loaded("--model", str(directory), "--runner", "pooling", "--dtype", "float32") as (worker, _, info):
        assert info.context_length == 32
        result = await worker.embed(EmbedRequest(inputs=list(TEXTS), request_id="e", truncate="cut"))
        found = np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
        np.testing.assert_allclose(found[:, [0, 192, 383]], RECORDED["prompted"], atol=1e-4)
        assert info.details["prompts"] == "passage, query"
        assert info.details["prompt_name"] == "query"
        passage = EmbedRequest(inputs=list(TEXTS), request_id="p", truncate="cut", prompt_name="passage")
        result = await worker.embed(passage)
        found = np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
        np.testing.assert_allclose(found[:, [0, 192, 383]], PASSAGES, atol=1e-4)
        with pytest.raises(ParameterRangeError, match="one of passage, query"):
            await worker.embed(EmbedRequest(inputs=["x"], request_id="u", prompt_name="title"))
        result = await worker.embed(chunked)
        mine, theirs = (np.frombuffer(one.data, dtype="<f4") for one in (result, expected))
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


async def _token_vectors_are_hidden_states(worker: VLLMWorker, minilm: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(minilm, dtype=torch.float32), AutoTokenizer.from_pretrained(minilm)
    texts = ["a cat", "quarterly revenue grew"]
    result = await worker.embed_tokens(EmbedTokensRequest(inputs=list(texts), request_id="t"))
    rows = np.frombuffer(result.data, dtype="<f4").reshape(-1, result.dimensions)
    parts = np.split(rows, np.cumsum(result.tokens)[:-1])
    for text, found in zip(texts, parts, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(found, torch.nn.functional.normalize(hidden, dim=-1).numpy(), atol=1e-4)
    short = await worker.embed_tokens(
        EmbedTokensRequest(inputs=["a cat"], request_id="s", dimensions=8, normalize=False)
    )
    assert (short.tokens, short.dimensions) == ([result.tokens[0]], 8)


async def _refuses(worker: VLLMWorker, vectors: Any) -> None:
    """What cannot be embedded says why, and harms nobody."""
    long = "word " * 1_000
    with pytest.raises(ContextOverflowError):
        await vectors("a cat", long)
    assert (await vectors(long, truncate="cut")).shape == (1, 384)
    assert np.linalg.norm(await vectors(long, truncate="chunk")) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ParameterRangeError, match="it must be 1 … 384"):
        await vectors("a cat", dimensions=1_000)
    with pytest.raises(UnsupportedParameterError, match="pooling"):
        await vectors("a cat", pooling="cls")
    with pytest.raises(RequestError, match="outside of the vocabulary"):
        await vectors([1, 10**6])
    with pytest.raises(UnsupportedOperationError, match="does not classify"):
        await worker.classify(ClassifyRequest(inputs=["x"]))


@pytest.mark.parametrize("classes", [1, 3])
async def test_a_classifier_classifies_and_scores(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=2,
        id2label=dict(enumerate(["good", "bad", "ugly"][:classes])),
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    async with loaded("--model", str(tmp_path), "--dtype", "float32") as (worker, _, info):
        rewards = ["reward"] * (classes == 1)
        assert info.capabilities == ["count_tokens", "tokenize", "detokenize", "classify", "score", *rewards]
        told = await worker.classify(ClassifyRequest(inputs=["good", "bad", "ugly", ["go", "od"]], request_id="c"))
        assert told.labels == ["good", "bad", "ugly"][:classes]
        *found, pair = told.probabilities
        assert pair == pytest.approx(found[0], abs=1e-4)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for text, line in zip(["good", "bad", "ugly"], found, strict=True):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                logits = model(ids).logits[0]
            expected = logits.softmax(-1) if classes > 1 else logits.sigmoid()
            assert line == pytest.approx(expected.tolist(), abs=1e-3)
        if classes == 1:
            chat = [{"role": "user", "content": "good"}]
            worths = await worker.reward(RewardRequest(inputs=["good", chat], request_id="r"))
            for text, worth in zip(["good", "<user>good\n<assistant>"], worths, strict=True):
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                with torch.inference_mode():
                    assert worth == pytest.approx(model(ids).logits[0].tolist(), abs=1e-3)
            pairs = await worker.score(ScoreRequest(query="go", documents=["od", "ld"]))
            assert pairs[0] == pytest.approx(found[0][0], abs=1e-4)
        else:
            with pytest.raises(UnsupportedOperationError, match="gives no rewards"):
                await worker.reward(RewardRequest(inputs=["x"], request_id="r"))
            with pytest.raises(RequestError, match="gives 3 classes"):
                await worker.score(ScoreRequest(query="go", documents=["od"]))


async def test_smollm2_answers(smollm2: Path) -> None:
    # vLLM's kernels for CPUs are coarse in bfloat16: the model then speaks of Paris in French.
    argv = ["--model", str(smollm2), "--dtype", "float32", "--max-model-len", "1024", "--model-names", "smollm2"]
    async with loaded(*argv) as (worker, answers, info):
        assert info.name == "smollm2"
        assert "chat" in info.capabilities
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        for name, options in {"free": {}, "guided": {"guided_regex": "It is (Rome|Paris)\\."}}.items():
            sampling = SamplingParams(temperature=0, max_new_tokens=20, **options)  # type: ignore[arg-type]
            worker.begin(GenerateRequest(messages=messages, request_id=name, sampling=sampling))
        await answers.until("free", "guided")
        assert answers.text("free") == "The capital of France is Paris."
        assert answers.last("free").finish_reason == "stop"
        assert answers.text("guided") == "It is Paris."
