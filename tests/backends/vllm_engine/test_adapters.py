"""LoRA adapters as models: the same names and results on both engines that have them, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import zfabric.testing
from tests.backends.test_lora import merged
from tests.backends.vllm_engine.conftest import Borrowed
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import FabricError, RequestError, UnknownModelError, UnsupportedParameterError

pytestmark = pytest.mark.asyncio(loop_scope="package")

PROMPT = "The quick brown fox jumps over the lazy dog and runs away"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def layers_of(model: Path) -> list[str]:
    settings = json.loads((model / "config.json").read_text())
    return [f"model.layers.{layer}.self_attn.q_proj" for layer in range(settings["num_hidden_layers"])]


def save_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter of the tiny model, far from the identity."""
    size = json.loads((model / "config.json").read_text())["hidden_size"]
    torch.manual_seed(seed)
    weights = {}
    for layer in layers_of(model):
        weights[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, size)
        weights[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(size, 4)
    directory.mkdir(exist_ok=True)
    save_file(weights, directory / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


def expected(model: Path, adapter: Path | None, count: int) -> list[int]:
    """What transformers makes of the prompt with the adapter merged into the weights."""
    ids = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt")["input_ids"]
    whole = merged(model, adapter, layers_of(model))
    output = whole.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@pytest_asyncio.fixture(loop_scope="package", params=["transformers", "vllm"])
async def client(
    request: pytest.FixtureRequest, lora_engine: VLLMWorker, vllm_llama: Path, adapters_dir: Path
) -> AsyncIterator[AsyncClient]:
    """A fabric with the tiny model and no adapter, on either engine."""
    options = TransformersOptions(
        model=str(vllm_llama), model_names=("tiny", "small"), dtype="float32", device="cpu", adapters_dir=adapters_dir
    )  # fmt: skip
    backend = Borrowed(lora_engine) if request.param == "vllm" else ModelWorker(options)
    async with zfabric.testing.serving(backend) as one:
        yield one
        name = await worker_name(one)
        for adapter in await one.operate(name, "list_adapters"):
            await one.operate(name, "unload_adapter", name=adapter)
    if request.param == "vllm":
        lora = lora_engine._served().lora
        assert not any((lora._held, lora._leaving, lora._pinned))


async def worker_name(client: AsyncClient) -> str:
    [worker] = await client.workers()
    return worker.name


async def test_calls_have_the_same_names_arguments_and_results(
    client: AsyncClient, vllm_llama: Path, tmp_path: Path
) -> None:
    worker = await worker_name(client)
    poet, critic = (save_adapter(tmp_path / name, vllm_llama, seed) for seed, name in enumerate(("poet", "critic")))

    async def call(what: str, **arguments: Any) -> Any:
        return await client.operate(worker, what, **arguments)

    def told(path: Path, **more: Any) -> dict[str, Any]:
        return {"path": str(path), "base": "tiny", "rank": 4, "pinned": False, "in_use": 0, **more}

    assert await call("list_adapters") == {}
    assert await call("load_adapter", name="poet", path=str(poet)) == {"poet": told(poet)}
    both = {"poet": told(poet), "critic": told(critic, pinned=True)}
    assert await call("load_adapter", name="critic", path=str(critic), pinned=True) == both
    details = {info.name: info.details for info in await client.models()}
    assert {name: details["critic"][name] for name in ("base", "adapter", "rank", "pinned")} == {
        "base": "tiny", "adapter": str(critic), "rank": 4, "pinned": True,
    }  # fmt: skip
    wrong: list[tuple[str, dict[str, Any], type[FabricError], str]] = [
        ("load_adapter", {"name": "x"}, UnknownModelError, "offers no adapter 'x'"),
        ("load_adapter", {"name": "../poet"}, UnknownModelError, "offers no adapter '../poet'"),
        ("load_adapter", {"name": "x", "path": "y", "speed": 3}, RequestError, "speed is unknown"),
        ("load_adapter", {"name": "x", "path": "y", "pinned": "yes"}, RequestError, "pinned is 'yes'"),
        ("load_adapter", {"name": "x", "path": 5}, RequestError, "path is 5"),
        ("load_adapter", {"name": "tiny", "path": "y"}, RequestError, "name of the model itself"),
        ("load_adapter", {"name": "small", "path": "y"}, RequestError, "name of the model itself"),
        ("load_adapter", {"name": "x", "path": str(tmp_path / "no")}, RequestError, "'x' cannot be loaded from"),
        ("load_adapter", {"name": "poet", "path": str(tmp_path / "no")}, RequestError, "'poet' cannot be loaded from"),
        ("unload_adapter", {"name": "nobody"}, UnknownModelError, "'nobody'"),
        ("unload_adapter", {"name": "poet", "pinned": True}, RequestError, "pinned is unknown"),
        ("list_adapters", {"name": "poet"}, RequestError, "name is unknown"),
    ]
    for what, arguments, error, text in wrong:
        with pytest.raises(error, match=text):
            await call(what, **arguments)
    assert await call("list_adapters") == both
    for model, adapter in (("tiny", None), ("poet", poet), ("critic", critic), ("small", None)):
        answer = await client.generate(model, PROMPT, max_new_tokens=12, **GREEDY)
        assert answer.token_ids == expected(vllm_llama, adapter, 12)
    assert await call("unload_adapter", name="poet") == {"critic": told(critic, pinned=True)}
    assert {info.name for info in await client.models()} == {"tiny", "critic"}


async def test_an_adapter_of_the_directory_is_loaded_when_it_is_asked_for(
    client: AsyncClient, vllm_llama: Path, adapters_dir: Path
) -> None:
    answer = await client.generate("offered", PROMPT, max_new_tokens=12, **GREEDY)
    assert answer.token_ids == expected(vllm_llama, adapters_dir / "offered", 12)
    assert {info.name for info in await client.models()} == {"tiny", "offered"}


async def test_an_adapter_is_replaced_in_place_and_who_runs_ends_with_what_it_began_with(
    client: AsyncClient, vllm_llama: Path, tmp_path: Path
) -> None:
    """Also where the new files stand where the old ones stood, and the prompt is one that was computed with those."""
    worker, path = await worker_name(client), tmp_path / "poet"
    first = save_adapter(path, vllm_llama, 3)
    await client.operate(worker, "load_adapter", name="poet", path=str(path))
    before = expected(vllm_llama, first, 200)
    running = client.stream("poet", PROMPT, max_new_tokens=200, **GREEDY)
    await anext(running)
    assert (await client.operate(worker, "list_adapters"))["poet"]["in_use"] == 1
    after = expected(vllm_llama, save_adapter(path, vllm_llama, 4), 12)
    assert after != before[:12]
    replaced = await client.operate(worker, "load_adapter", name="poet", path=str(path))
    assert replaced["poet"]["in_use"] == 0
    assert (await client.generate("poet", PROMPT, max_new_tokens=12, **GREEDY)).token_ids == after
    assert await client.operate(worker, "unload_adapter", name="poet") == {}
    assert (await running.collect()).token_ids == before


async def test_more_adapters_than_there_are_places_beside_a_pinned_one_wait_for_one_another(
    client: AsyncClient, vllm_llama: Path, tmp_path: Path
) -> None:
    worker, names = await worker_name(client), ["pinned", "red", "blue"]
    paths = {name: save_adapter(tmp_path / name, vllm_llama, 10 + seed) for seed, name in enumerate(names)}
    for name in names:
        await client.operate(worker, "load_adapter", name=name, path=str(paths[name]), pinned=name == "pinned")
    order = ["red", "blue", "pinned", "red", "blue", "pinned"]
    streams = [client.stream(name, PROMPT, max_new_tokens=24, **GREEDY) for name in order]
    for name, stream in zip(order, streams, strict=True):
        assert (await stream.collect()).token_ids == expected(vllm_llama, paths[name], 24)


# ── what one of the engines alone does ──────────────────────────────────────────────────────────────────────────────


async def test_one_place_stays_free_and_the_engine_would_die_of_prompt_logprobs(
    lora_engine: VLLMWorker, vllm_llama: Path, tmp_path: Path
) -> None:
    paths = [save_adapter(tmp_path / name, vllm_llama, 20 + seed) for seed, name in enumerate(("a", "b"))]
    async with zfabric.testing.serving(Borrowed(lora_engine)) as client:
        worker = await worker_name(client)
        await client.operate(worker, "load_adapter", name="a", path=str(paths[0]), pinned=True)
        with pytest.raises(RequestError, match=r"1 adapters are pinned in 2 places \(--max-loras\)"):
            await client.operate(worker, "load_adapter", name="b", path=str(paths[1]), pinned=True)
        assert list(await client.operate(worker, "unload_adapter", name="a")) == []
        with pytest.raises(UnsupportedParameterError, match="prompt_logprobs"):
            await client.generate("tiny", "Hello", prompt_logprobs=1)


async def test_what_a_connector_of_caches_is_told_and_tells_passes_through(lora_engine: VLLMWorker) -> None:
    async with zfabric.testing.serving(Borrowed(lora_engine)) as client:
        extra = {"kv_transfer_params": {"do_remote_decode": True, "peer": "b"}}
        answer = await client.generate("tiny", PROMPT, max_new_tokens=2, extra=extra, **GREEDY)
        told = answer.extra["kv_transfer_params"]
        assert {"do_remote_decode": True, "peer": "b"}.items() <= told["told"].items()
        assert told["blocks"] >= 1
        assert (await client.generate("tiny", PROMPT, max_new_tokens=2, **GREEDY)).extra == {}
