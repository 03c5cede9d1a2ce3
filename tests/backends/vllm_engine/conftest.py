"""One real engine on a tiny model for all tests of this directory; it starts in half a minute."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.tiny import Answers, save_llama
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.wire.payloads import GenerateRequest, OperateRequest

if find_spec("vllm") is None:
    # There is no build of it for this platform, see requirements/vllm.txt.
    collect_ignore_glob = ["test_*.py"]

#: A cache of the smallest size, and no search for a hub.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
#: The engine's process computes by itself, instead of starting another one that does.
ENVIRONMENT |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
#: Steps of the tests have several parts, as those of hundreds of streams.
ENVIRONMENT |= {"VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "16"}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

#: What every engine of these tests is started with.
ENGINE = ["--enforce-eager", "--distributed-executor-backend", "uni"]
TINY = [*ENGINE, "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "256", "--block-size", "32"]
TINY += ["--max-logprobs", "20", "--scheduling-policy", "priority"]

Served = tuple[VLLMWorker, Answers]


class Borrowed(VLLMWorker):
    """The engine of all tests, which has loaded already and stays when its fabric goes."""

    def __init__(self, engine: VLLMWorker) -> None:
        self.__dict__ = engine.__dict__

    async def load(self) -> Any:
        return self._models()

    async def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def vllm_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama whose heads are as wide as vLLM wants them on a CPU."""
    return save_llama(tmp_path_factory.mktemp("vllm-llama"), heads=2)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def tiny_engine(vllm_llama: Path) -> AsyncIterator[VLLMWorker]:
    """A worker on the tiny model in float32."""
    worker = VLLMWorker(["--model", str(vllm_llama), "--model-names", "tiny", "alias", *TINY])
    worker.steps = Answers()
    await worker.load()
    yield worker
    await worker.close()


@pytest_asyncio.fixture(loop_scope="package")
async def served(tiny_engine: VLLMWorker) -> AsyncIterator[Served]:
    """The engine, with a sink of its own. At the end nothing may be left in it."""
    tiny_engine.steps = answers = Answers()
    yield tiny_engine, answers
    runtime = tiny_engine._runtime
    assert runtime is not None
    assert runtime.engine.get_num_unfinished_requests() == 0
    assert not tiny_engine._answers
    assert not tiny_engine._admissions


async def run(served: Served, *requests: GenerateRequest) -> Answers:
    worker, answers = served
    for request in requests:
        worker.begin(request)
    await answers.until(*(request.request_id for request in requests))
    return answers


async def operate(worker: VLLMWorker, call: str, **arguments: Any) -> Any:
    return await worker.operate(OperateRequest(call=call, arguments=arguments, request_id="operator"))
