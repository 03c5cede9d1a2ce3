"""One real engine on a tiny model for all tests of this directory; it starts in half a minute."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.served import vllm_server
from tests.backends.test_lora import save_adapter
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

#: What vLLM's own server is started with, for text and for vectors.
OPENAI_SERVER = [*TINY, "--served-model-name", "tiny", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
EMBEDDINGS_SERVER = [*ENGINE, "--runner", "pooling", "--dtype", "float32", "--served-model-name", "minilm"]

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
async def openai_server(vllm_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The root of vLLM's own server, with the tiny model as "tiny"."""
    async with vllm_server(vllm_llama, tmp_path_factory.mktemp("openai"), *OPENAI_SERVER) as url:
        yield url


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def embeddings_server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The root of another one, with the real MiniLM as "minilm"."""
    async with vllm_server(minilm, tmp_path_factory.mktemp("embeddings"), *EMBEDDINGS_SERVER) as url:
        yield url


@pytest.fixture(scope="package")
def models_file(openai_server: str, vllm_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model three times: as completions ("plain"), as chat, and as chat of a server that is not known ("openai")."""
    common = {"base_url": f"{openai_server}/v1", "model": "tiny", "tokenizer": str(vllm_llama), "context_length": 512}
    models = {
        "plain": {**common, "protocol": "completions", "server": "vllm"},
        "chat": {**common, "protocol": "chat", "server": "vllm"},
        "openai": {**common, "protocol": "chat", "server": "openai"},
    }
    file = tmp_path_factory.mktemp("models") / "models.json"
    file.write_text(json.dumps({"models": models}))
    return file


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def tiny_engine(vllm_llama: Path) -> AsyncIterator[VLLMWorker]:
    """A worker on the tiny model in float32."""
    worker = VLLMWorker(["--model", str(vllm_llama), "--model-names", "tiny", "alias", *TINY])
    worker.steps = Answers()
    await worker.load()
    yield worker
    await worker.close()


@pytest.fixture(scope="package")
def adapters_dir(vllm_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the adapter `offered`, of all layers' queries."""
    directory = tmp_path_factory.mktemp("adapters")
    count = json.loads((vllm_llama / "config.json").read_text())["num_hidden_layers"]
    layers = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(count)]
    save_adapter(directory / "offered", vllm_llama, 5, layers=layers, target_modules=["q_proj"])
    return directory


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def lora_engine(vllm_llama: Path, adapters_dir: Path) -> AsyncIterator[VLLMWorker]:
    """The same with places for two adapters, one more on offer, and a connector of caches."""
    connector = {
        "kv_connector": "NotingConnector",
        "kv_connector_module_path": "tests.backends.vllm_engine.connector",
        "kv_role": "kv_both",
    }
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--kv-transfer-config", json.dumps(connector)]
    lora += ["--adapters-dir", str(adapters_dir)]
    worker = VLLMWorker(["--model", str(vllm_llama), "--model-names", "tiny", "small", *lora, *TINY])
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests here start engines, which take a minute or two each on a busy machine."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(400))
