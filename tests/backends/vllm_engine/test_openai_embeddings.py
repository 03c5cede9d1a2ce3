"""hf-api on /v1/embeddings of vLLM's own server with the real MiniLM: the vectors are those that transformers makes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.backends.faulty import Announced
from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ContextOverflowError
from zfabric.wire.tasks import EmbedRequest
from zfabric.worker.base import BaseModelWorker

pytestmark = pytest.mark.asyncio(loop_scope="package")

TEXTS = ["a cat", "a kitten", "quarterly revenue", "the quick brown fox jumps over the lazy dog", "é"]


async def vectors(worker: BaseModelWorker, inputs: list[Any], **options: Any) -> np.ndarray[Any, Any]:
    result = await worker.embed(EmbedRequest(inputs=inputs, model="minilm", **options))
    return np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)


async def test_vectors_are_those_of_the_model(embeddings_server: str, minilm: Path, tmp_path: Path) -> None:
    options = TransformersOptions(model=str(minilm), model_names=("minilm",), dtype="float32", device="cpu", threads=1)
    here = ModelWorker(options)
    here.steps = Announced()
    await here.load()
    expected = await vectors(here, TEXTS)
    await here.close()

    entry = {
        "base_url": f"{embeddings_server}/v1",
        "model": "minilm",
        "protocol": "embeddings",
        "server": "vllm",
        "batch_size": 2,
    }
    file = tmp_path / "models.json"
    file.write_text(json.dumps({"models": {"minilm": entry}}))
    worker = HuggingfaceApiWorker(HuggingfaceApiOptions(models=file))
    worker.steps = Announced()
    (info,) = list(await worker.load())
    assert info.capabilities == ["embed"]
    np.testing.assert_allclose(await vectors(worker, TEXTS), expected, atol=1e-4)
    tokens = AutoTokenizer.from_pretrained(minilm)("a cat")["input_ids"]
    np.testing.assert_allclose((await vectors(worker, [tokens]))[0], expected[0], atol=1e-4)
    short = (await vectors(worker, ["a cat"], dimensions=64))[0]
    np.testing.assert_allclose(short, expected[0][:64] / np.linalg.norm(expected[0][:64]), atol=1e-4)
    with pytest.raises(ContextOverflowError, match="maximum"):
        await vectors(worker, ["word " * 1_000])
    assert (await vectors(worker, ["word " * 1_000], truncate="cut")).shape == (1, expected.shape[1])
    await worker.close()
