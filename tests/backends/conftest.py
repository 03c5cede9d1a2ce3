"""Models and workers, loaded once."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest_asyncio
import torch

from tests.backends.tiny import Answers, save_llama
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.models.wheels import prepare

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama."""
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct."""
    return prepare("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Directory of the real all-MiniLM-L6-v2."""
    return prepare("minilm")


@pytest_asyncio.fixture
async def tiny_worker(tiny_llama: Path) -> AsyncIterator[tuple[ModelWorker, Answers]]:
    """A worker on the tiny model in float32, with the sink that it emits to."""
    worker = ModelWorker(TransformersOptions(model=str(tiny_llama), dtype="float32", device="cpu"))
    worker.steps = answers = Answers()
    await worker.load()
    yield worker, answers
    await worker.close()
