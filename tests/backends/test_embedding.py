"""Vectors: of the real MiniLM, in shared passes, of long texts, and of causal models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModel, AutoTokenizer

from tests.backends.test_architectures import FAMILIES, save
from tests.backends.test_engine import hold
from tests.backends.tiny import Answers, ask
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import (
    BackendError,
    OutOfMemoryError,
    ParameterRangeError,
    RequestError,
    UnsupportedOperationError,
)
from zfabric.wire.payloads import CountRequest, GenerateRequest
from zfabric.wire.tasks import EmbedRequest

Vectors = np.ndarray[Any, Any]


@pytest_asyncio.fixture
async def embedder(minilm: Path) -> AsyncIterator[ModelWorker]:
    """A worker on the real MiniLM."""
    worker = ModelWorker(TransformersOptions(model=str(minilm), device="cpu", embed_batch_tokens=64))
    worker.steps = Answers()
    await worker.load()
    yield worker
    await worker.close()


async def vectors(worker: ModelWorker, *inputs: Any, **options: Any) -> Vectors:
    result = await worker.embed(EmbedRequest(inputs=list(inputs), **options))
    return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)


def by_hand(directory: Path, text: str) -> Vectors:
    """What the model's card says: cut to 256 tokens, masked mean, length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    with torch.inference_mode():
        encoded = tokenizer(text, truncation=True, max_length=256, return_tensors="pt", padding=False)
        hidden = model(**encoded).last_hidden_state[0]
    return np.asarray(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())


async def test_minilm_gives_the_vectors_of_its_card(embedder: ModelWorker, minilm: Path) -> None:
    texts = ["a cat", "a kitten", "quarterly revenue", "word " * 700]
    found = await vectors(embedder, *texts, truncate="cut")
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_allclose(vector, by_hand(minilm, text), atol=1e-5)
    assert found[0] @ found[1] == pytest.approx(0.766, abs=1e-3)
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2]


async def test_a_long_text_is_the_mean_of_its_pieces(embedder: ModelWorker) -> None:
    words = ["cat", "dog", "cow", "red", "blue"] * 80
    whole = (await vectors(embedder, " ".join(words), truncate="chunk", normalize=False))[0]
    # Each word is one token: 254 of them and two special ones fill a piece.
    parts = await vectors(embedder, " ".join(words[:254]), " ".join(words[254:]), normalize=False)
    np.testing.assert_allclose(whole, (parts[0] * 256 + parts[1] * 148) / 404, atol=1e-5)


async def test_requests_that_wait_together_share_passes(embedder: ModelWorker) -> None:
    assert embedder._assembled is not None
    passes: list[tuple[int, int]] = []
    embedder._assembled.loaded.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    texts = ["a", "the quick brown fox", "b c d", "one two three four five six", "e"]
    single = [(await vectors(embedder, text))[0] for text in texts]
    passes.clear()
    gate = hold(embedder)
    tasks = [asyncio.create_task(vectors(embedder, text, "again " * n)) for n, text in enumerate(texts, start=1)]
    assert embedder._assembled is not None
    while len(embedder._assembled.queue._works) < len(tasks):
        await asyncio.sleep(0)
    gate.set()
    together = await asyncio.gather(*tasks)
    assert len(passes) < len(texts)
    assert all(rows * width <= 64 for rows, width in passes)
    for expected, found in zip(single, together, strict=True):
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


async def test_many_texts_of_one_request_do_not_go_before_everybody(embedder: ModelWorker) -> None:
    """Of 2,000 texts that fill a pass by eights, no more than two passes go before a small request that comes after them."""
    assert embedder._assembled is not None
    queue = embedder._assembled.queue
    begun: list[set[int]] = []
    begin = embedder._assembled.embedder.begin

    def noted(pieces: Any, *given: Any) -> Any:
        begun.append({piece.tokens[1] for piece in pieces})
        return begin(pieces, *given)

    embedder._assembled.embedder.begin = noted  # type: ignore[method-assign, assignment]
    gate = hold(embedder)
    # Each text's first word tells whose it is.
    many = asyncio.create_task(vectors(embedder, *(["dog " * 6] * 2_000)))
    while len(queue._works) < 1:
        await asyncio.sleep(0)
    small = [asyncio.create_task(vectors(embedder, f"{word} sleeps")) for word in ("cat", "horse", "cow")]
    while len(queue._works) < 4:
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*small)
    assert not many.done()
    tokens = [(await embedder.tokenize(CountRequest(prompt=word)))[1] for word in ("cat", "horse", "cow")]
    served = [next(number for number, owners in enumerate(begun) if token in owners) for token in tokens]
    assert max(served) <= 2
    # Those of the large one go along with them, and on.
    dog = (await embedder.tokenize(CountRequest(prompt="dog")))[1]
    assert all(dog in owners for owners in begun)
    many.cancel()
    await asyncio.gather(many, return_exceptions=True)


async def test_a_cancelled_request_is_not_computed(embedder: ModelWorker) -> None:
    assert embedder._assembled is not None
    gate = hold(embedder)
    task = asyncio.create_task(vectors(embedder, *(["word " * 60] * 50)))
    while not embedder._assembled.queue._works:
        await asyncio.sleep(0)
    passes: list[int] = []
    embedder._assembled.loaded.model.register_forward_pre_hook(lambda *_: passes.append(1))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.set()
    await vectors(embedder, "after")
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError), (ValueError("odd"), BackendError)],
)
async def test_a_text_that_fails_costs_its_own_request(
    embedder: ModelWorker, error: Exception, kind: type[Exception]
) -> None:
    assert embedder._assembled is not None

    def fail(_: Any, __: Any, given: dict[str, Any]) -> None:
        if (given["input_ids"] == 4937).any():  # "cat"
            raise error

    embedder._assembled.loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    gate = hold(embedder)
    tasks = [asyncio.create_task(vectors(embedder, text)) for text in ("a dog", "a cat", "a cow")]
    while len(embedder._assembled.queue._works) < 3:
        await asyncio.sleep(0)
    gate.set()
    dog, cat, cow = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(cat, kind)
    assert isinstance(dog, np.ndarray)
    assert isinstance(cow, np.ndarray)


async def test_poolings_and_dimensions(embedder: ModelWorker, minilm: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    with torch.inference_mode():
        hidden = model(**tokenizer("a small cat", return_tensors="pt")).last_hidden_state[0]
    for pooling, expected in (("cls", hidden[0]), ("last", hidden[-1]), ("mean", hidden.mean(dim=0))):
        found = await vectors(embedder, "a small cat", "another text that is longer", pooling=pooling, normalize=False)
        np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)
    assert (await vectors(embedder, "a", dimensions=5)).shape == (1, 5)
    for dimensions in (0, 385):
        with pytest.raises(ParameterRangeError):
            await vectors(embedder, "a", dimensions=dimensions)
    with pytest.raises(RequestError):
        await vectors(embedder, [1, 10**6])


async def test_an_encoder_does_not_generate(embedder: ModelWorker) -> None:
    with pytest.raises(UnsupportedOperationError):
        embedder.begin(GenerateRequest(prompt="x", request_id="a"))


async def test_token_ids_are_taken_as_they_are(embedder: ModelWorker, minilm: Path) -> None:
    ids = AutoTokenizer.from_pretrained(minilm)("a small cat")["input_ids"]
    np.testing.assert_allclose(await vectors(embedder, ids), await vectors(embedder, "a small cat"), atol=1e-6)


async def test_causal_models_embed_as_well(tiny_worker: tuple[ModelWorker, Answers]) -> None:
    worker, _ = tiny_worker
    alone = await vectors(worker, "hello")
    together = await vectors(worker, "hello", "a longer neighbour in the same pass")
    assert alone.shape == (1, 64)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "OPTConfig", "BloomConfig", "MistralConfig"])
async def test_vectors_take_turns_with_streams_in_parts_as_large_as_those_may_wait_for(
    family: str, tmp_path: Path
) -> None:
    directory = save(tmp_path, family, {**FAMILIES.get(family, {}), "num_key_value_heads": 2})
    worker = ModelWorker(TransformersOptions(model=str(directory), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    texts = ["a long text " * 12, "another that is not quite as long " * 3, "a short one"]
    alone = [(await vectors(worker, text))[0] for text in texts]
    assert worker._assembled is not None
    passes: list[int] = []
    embedder = worker._assembled.embedder
    real = embedder.hidden

    def hidden(*given: Any) -> Any:
        passes.append(given[0].shape[0] * (given[5] - given[4]))
        return real(*given)

    embedder.hidden = hidden  # type: ignore[method-assign, assignment]
    # The budget finds every part too slow: it goes down to its least.
    worker._assembled.queue._token_budget.wait_s = 0.0
    worker.begin(ask("stream", "Hello", temperature=0, max_new_tokens=100, ignore_eos=True))
    await answers.until("stream", tokens=2)
    together = await vectors(worker, *texts)
    assert not answers.ended("stream")
    await answers.until("stream")
    await worker.close()
    assert len(passes) > 5
    assert max(passes[2:]) <= 64
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)


async def test_an_engine_that_ends_within_a_pass_says_so(tmp_path: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(save(tmp_path, "LlamaConfig", {})), device="cpu"))
    worker.steps = Answers()
    await worker.load()
    assert worker._assembled is not None
    queue, embedder = worker._assembled.queue, worker._assembled.embedder
    queue._token_budget.wait_s, queue._running = 0.0, lambda: True
    begun, go_on = threading.Event(), threading.Event()
    real = embedder.hidden

    def hidden(*given: Any) -> Any:
        begun.set()
        go_on.wait()
        return real(*given)

    embedder.hidden = hidden  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(vectors(worker, "a long text " * 60))
    await asyncio.to_thread(begun.wait)
    closing = asyncio.create_task(worker.close())
    while not worker._assembled.engine._stopping:
        await asyncio.sleep(0)
    go_on.set()
    await closing
    with pytest.raises(BackendError):
        await task
