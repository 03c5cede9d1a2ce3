"""LoRA adapters as models, on an engine of their own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

from tests.backends.vllm_engine.conftest import TINY
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import RequestError, UnknownModelError, UnsupportedParameterError


def save_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter of the tiny model, far from the identity."""
    settings = json.loads((model / "config.json").read_text())
    size, layers = settings["hidden_size"], settings["num_hidden_layers"]
    torch.manual_seed(seed)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, size)
        weights[f"{name}.lora_B.weight"] = torch.randn(size, 4)
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


@pytest_asyncio.fixture
async def served(vllm_llama: Path, tmp_path: Path) -> AsyncIterator[tuple[AsyncClient, VLLMWorker]]:
    """A fabric with the tiny model, and one adapter of it."""
    poet = save_adapter(tmp_path / "poet", vllm_llama, 1)
    argv = [
        "--model",
        str(vllm_llama),
        "--model-names",
        "tiny",
        "small",
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--max-loras",
        "2",
    ]
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as one:
            worker = VLLMWorker([*argv, "--lora-modules", f"poet={poet}", *TINY])
            await made.add_worker("w0", worker)
            yield one, worker


async def test_adapters_come_and_go_as_models(
    served: tuple[AsyncClient, VLLMWorker], vllm_llama: Path, tmp_path: Path
) -> None:
    client, worker = served
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    assert {info.name for info in await client.models()} == {"tiny", "poet"}
    with pytest.raises(UnknownModelError):
        await client.generate("critic", "Hello", **options)
    critic = save_adapter(tmp_path / "critic", vllm_llama, 2)
    assert list(await client.operate("w0", "load_adapter", name="critic", path=str(critic))) == ["poet", "critic"]
    names = ["tiny", "poet", "critic"]
    # One after another: vLLM's kernels for CPUs take a request without an adapter for one with the last, in one batch.
    answers = [await client.generate(name, "Hello", **options) for name in names]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert list(await client.operate("w0", "list_adapters")) == ["poet", "critic"]
    with pytest.raises(RequestError, match="'nobody' cannot be loaded from"):
        await client.operate("w0", "load_adapter", name="nobody", path=str(tmp_path / "nowhere"))
    for taken in ("tiny", "small"):
        with pytest.raises(RequestError, match="name of the model itself"):
            await client.operate("w0", "load_adapter", name=taken, path=str(critic))
    assert (await client.generate("tiny", "Hello", **options)).token_ids == answers[0].token_ids
    assert list(await client.operate("w0", "unload_adapter", name="poet")) == ["critic"]
    # Who named it and waited meanwhile is told so; the model itself does not answer in its name.
    with pytest.raises(UnknownModelError, match="poet"):
        worker._served().adapters.find("poet")
    assert {info.name for info in await client.models()} == {"tiny", "critic"}
    again = [await client.generate(name, "Hello", **options) for name in ("tiny", "critic")]
    assert [answer.token_ids for answer in again] == [answers[0].token_ids, answers[2].token_ids]
    # The engine would die of it.
    with pytest.raises(UnsupportedParameterError, match="prompt_logprobs"):
        await client.generate("tiny", "Hello", prompt_logprobs=1)
