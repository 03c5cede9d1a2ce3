"""On a CUDA device: each kind of model says there what it says on the CPU, and memory is bounded and freed.

``pytest -m gpu tests/backends`` on a GPU host runs these and the others that are marked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.pictures import ask as look
from tests.backends.pictures import chat, png, text
from tests.backends.test_engine import greedy
from tests.backends.test_lora import adapters, to
from tests.backends.test_paired import tiny_t5
from tests.backends.test_vision import tiny_llava
from tests.backends.tiny import Answers, ask
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import OutOfMemoryError
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.tasks import EmbedRequest

__all__ = ["adapters", "tiny_llava", "tiny_t5"]  # fixtures
pytestmark = pytest.mark.gpu
PROMPTS = ["Hello", "The quick brown fox jumps over", "a", "Once upon a time"]


async def say(directory: Path, requests: list[GenerateRequest], device: str, **options: Any) -> dict[str, list[int]]:
    worker = ModelWorker(TransformersOptions(model=str(directory), dtype="float32", device=device, **options))
    worker.steps = answers = Answers()
    await worker.load()
    for request in requests:
        worker.begin(request)
    await answers.until(*(request.request_id for request in requests))
    await worker.close()
    assert not answers.errors
    return {request.request_id: answers.tokens(request.request_id) for request in requests}


async def same(directory: Path, requests: list[GenerateRequest], **options: Any) -> None:
    there = await say(directory, requests, "cuda", **options)
    assert there == await say(directory, requests, "cpu", **options)


async def test_compiled_steps(tiny_llama: Path) -> None:
    await same(tiny_llama, [greedy(prompt, prompt, 150) for prompt in PROMPTS], compile=True)


async def test_an_encoder_decoder(tiny_t5: Path) -> None:
    await same(tiny_t5, [greedy(prompt, prompt, 20) for prompt in PROMPTS])


async def test_images(tiny_llava: Path) -> None:
    requests = [look(color, chat({"type": "image", "image": png(color)}, text("What?"))) for color in ("red", "blue")]
    await same(tiny_llava, requests)


async def test_adapters_in_one_batch(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    flags = tuple(f"{name}={path}" for name, path in adapters.items())
    await same(tiny_llama, [to(name, name) for name in ("base", *adapters)], model_names=("base",), lora=flags)


async def test_guides_searches_and_penalties(tiny_llama: Path) -> None:
    requests = [
        ask("guided", guided_regex="[ab]{20}", temperature=0),
        ask("searched", use_beam_search=True, best_of=3, max_new_tokens=12, ignore_eos=True),
        ask("penalized", temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, max_new_tokens=20),
    ]
    await same(tiny_llama, requests)


async def test_chunks_and_a_full_cache(tiny_llama: Path) -> None:
    requests = [greedy(prompt, prompt * 4, 40) for prompt in PROMPTS]
    await same(tiny_llama, requests, prefill_chunk_tokens=16, kv_tokens_max=300)


async def test_vectors(minilm: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        worker = ModelWorker(TransformersOptions(model=str(minilm), dtype="float32", device=device))
        worker.steps = Answers()
        await worker.load()
        result = await worker.embed(EmbedRequest(inputs=["a cat", "the quick brown fox"]))
        found.append(np.frombuffer(result.data, dtype="<f4"))
        await worker.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


async def test_the_cache_takes_what_the_device_has_left(tiny_llama: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), dtype="float16", device="cuda"))
    worker.steps = Answers()
    (info,) = await worker.load()
    await worker.close()
    free, _ = torch.cuda.mem_get_info()
    token_bytes = 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, size, float16
    assert 0 < int(info.details["kv_tokens_max"] or 0) * token_bytes < free
    assert worker.slots == 256


async def test_memory_that_runs_out_costs_the_request_that_did_it(tiny_llama: Path) -> None:
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), dtype="float32", device="cuda"))
    worker.steps = answers = Answers()
    await worker.load()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        worker.begin(greedy("large", "x" * 400, 4, n=64))
        await answers.until("large")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    worker.begin(greedy("next", "Hello", 4))
    await answers.until("next")
    await worker.close()
    assert isinstance(answers.errors["large"], OutOfMemoryError)
    assert len(answers.tokens("next")) == 4


async def test_weights_are_spread_over_devices(tiny_llama: Path) -> None:
    requests = [greedy(prompt, prompt, 20) for prompt in PROMPTS]
    spread = await say(tiny_llama, requests, "cuda", device_map="auto", max_gpu_memory="1GiB")
    assert spread == await say(tiny_llama, requests, "cpu")
