"""Weights of 8 and 4 bits: narrow in memory, and each text is what `generate` says of the same narrow weights."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.backends.test_engine import Start, causal_model, starting
from tests.backends.test_lora import PROMPT, expected, save_adapter, to
from tests.backends.test_weights import operate
from tests.backends.tiny import Answers, ask, save_llama
from zfabric.backends.hf_transformers.loading import model_loader
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.parameters import quantization
from zfabric.backends.hf_transformers.parameters.packing import pack
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, UnsupportedOperationError

ON_A_CPU = ("8bit", "4bit", "fp8", "int8")
#: Bits of a weight, and what is kept beside of one number per row, or per 64 weights.
BITS = {"8bit": 8, "4bit": 4, "fp8": 8, "int8": 8}
#: What its linear layers but the last one hold.
INNER = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "auto") as start_one:
        yield start_one


def loaded(model: Path, name: Any = None, **options: Any) -> model_loader.Loaded:
    return model_loader.load(
        TransformersOptions(model=str(model), device="cpu", quantization=name, kv_tokens_max=2_000, **options)
    )


def generated(found: model_loader.Loaded, count: int, prompt: str = PROMPT) -> list[int]:
    inputs = found.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = found.model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


async def said(worker: ModelWorker, answers: Answers, name: str, count: int = 16) -> list[int]:
    worker.begin(ask(name, PROMPT, temperature=0, max_new_tokens=count, ignore_eos=True))
    await answers.until(name)
    return answers.tokens(name)


@pytest.mark.parametrize("name", ON_A_CPU)
async def test_narrow_weights_say_what_generate_says_of_them(start: Start, tiny_llama: Path, name: str) -> None:
    """Alone, and in company: rows of others change nothing."""
    found = loaded(tiny_llama, name, dtype="float32")
    worker, answers = await start(quantization=name, dtype="float32")
    assert await said(worker, answers, "alone") == generated(found, 16)
    for other in ("a", "b"):
        worker.begin(ask(other, "Another text of its own " + other, temperature=0, max_new_tokens=16, ignore_eos=True))
    assert await said(worker, answers, "together") == generated(found, 16)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_weights_take_the_bits_that_they_are_said_to(tiny_llama: Path, name: str) -> None:
    plain, found = loaded(tiny_llama), loaded(tiny_llama, name)
    whole = quantization.weight_bytes(plain.model)
    assert whole == sum(one.numel() * 4 for one in (*plain.model.parameters(), *plain.model.buffers()))
    told = found.quantized
    assert told["quantization"] == name
    assert not plain.quantized
    narrow = int(told["weight_bytes"]) - (whole - 4 * INNER)
    packed = INNER * BITS[name] // 8
    # Beside them lie scales, of 4 bytes for 64 weights at the most.
    assert packed < narrow <= packed + INNER // 64 * 4 + 1_024
    types = {type(one) for one in found.model.parameters()} - {torch.nn.Parameter}
    assert len(types) == 1


async def test_adapters_are_added_to_narrow_weights(start: Start, tiny_llama: Path, tmp_path: Path) -> None:
    found = loaded(tiny_llama, "int8", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, module in found.model.named_modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, "dequantize") and "proj" in name:
            plain.get_submodule(name).weight.data = module.weight.dequantize()
    plain.save_pretrained(tmp_path / "rounded")
    found.tokenizer.save_pretrained(tmp_path / "rounded")
    adapter = save_adapter(tmp_path / "one", tiny_llama, 1)
    worker, answers = await start(quantization="int8", dtype="float32", lora=(f"one={adapter}",))
    worker.begin(to("one", "x", 16))
    await answers.until("x")
    assert answers.tokens("x") == expected(tmp_path / "rounded", adapter, 16)


async def test_narrow_weights_are_not_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    worker = ModelWorker(
        TransformersOptions(model=str(tiny_llama), device="cpu", quantization="int8", weights_dir=tmp_path)
    )
    worker.steps = Answers()
    (info,) = await worker.load()
    assert info.details["quantization"] == "int8"
    assert int(str(info.details["weight_bytes"])) == quantization.weight_bytes(causal_model(worker))
    with pytest.raises(UnsupportedOperationError, match="they are quantized"):
        await operate(worker, "start_weight_update", size=1_000)
    await worker.close()


def test_narrow_weights_are_not_packed() -> None:
    """Of a size that would be: a layer of torchao is a plain one, whose weight is of another kind."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    quantize_(layers[0], Int8WeightOnlyConfig())
    x = torch.randn(3, 512)
    with torch.inference_mode():
        before = layers(x)
        assert pack(layers) == 1
        torch.testing.assert_close(layers(x), before)


Pack = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def save_packed(directory: Path, settings: dict[str, Any], pack: Pack = lambda name, weight: {name: weight}) -> Path:
    """A checkpoint that says how its weights are quantized."""
    directory.mkdir()
    save_llama(directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        tensors |= pack(name, weight) if name.endswith("proj.weight") else {name: weight}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return directory


def blocks(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8 with one scale for each block of 128 × 128: these weights are one block each."""
    scale = weight.abs().max() / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}


def channels(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """FP8 with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FP8, "strategy": "channel"},
            "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
        }
    },
}


async def test_a_checkpoint_of_narrow_weights_is_served_as_it_is(start: Start, tmp_path: Path) -> None:
    model = save_packed(tmp_path / "channels", CHANNELS, channels)
    found = loaded(model)
    assert found.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
    assert found.quantized["quantization"] == "compressed-tensors"
    worker, answers = await start(model=str(model))
    assert await said(worker, answers, "x") == generated(found, 16)


async def test_blocks_of_fp8_are_unpacked_without_a_device(start: Start, tmp_path: Path) -> None:
    model = save_packed(tmp_path / "blocks", BLOCKS, blocks)
    found = loaded(model)
    assert found.quantized["quantization"] == "fp8, unpacked"
    name = "model.layers.0.self_attn.q_proj"
    packed = load_file(model / "model.safetensors")
    values = packed[f"{name}.weight"].float() * packed[f"{name}.weight_scale_inv"]
    assert torch.equal(found.model.get_submodule(name).weight, values)
    worker, answers = await start(model=str(model))
    assert await said(worker, answers, "x") == generated(found, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum|gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
        ({"quant_method": "odd"}, "quantized by odd, which transformers does not know"),
    ],
)
def test_what_a_checkpoint_needs_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.fail("the packages are there, so this cannot be tried")
    with pytest.raises(ConfigurationError, match=message):
        loaded(save_packed(tmp_path / "model", settings))


def test_what_does_not_go_together_is_named(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="weights are quantized by fp8: it is served as it is, without --quant"
    ):
        loaded(save_packed(tmp_path / "blocks", BLOCKS, blocks), "int8")
    with pytest.raises(ConfigurationError, match=r"'int4' needs a CUDA device.* not 'cpu'"):
        loaded(tiny_llama, "int4")
    options = TransformersOptions(model="x", gguf_file="x.gguf", quantization="int8")
    with pytest.raises(ConfigurationError, match="does not go with a GGUF file"):
        model_loader._placement(options, "cpu", None)
    with pytest.raises(ConfigurationError, match="8bit alone"):
        loaded(tiny_llama, "4bit", cpu_offload=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name, package in (("8bit", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(ConfigurationError, match=rf"needs {package}: pip install 'zfabric\[quantized\]'"):
            loaded(tiny_llama, name)


def placed(tiny_llama: Path, name: Any, device: str = "cuda:0", **options: Any) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(tiny_llama)
    return model_loader._placement(TransformersOptions(model="x", quantization=name, **options), device, config)


def test_what_quantizers_are_told(tiny_llama: Path, monkeypatch: Any) -> None:
    four = placed(tiny_llama, "4bit", dtype="bfloat16")
    assert four["quantization_config"].load_in_4bit
    assert four["quantization_config"].bnb_4bit_compute_dtype == four["dtype"] == torch.bfloat16
    assert four["device_map"] == "cuda:0"
    eight = placed(tiny_llama, "8bit", device_map="auto")
    assert eight["quantization_config"].load_in_8bit
    assert eight["device_map"] == "auto"
    assert not eight["quantization_config"].llm_int8_enable_fp32_cpu_offload
    assert placed(tiny_llama, "8bit", cpu_offload=True)["quantization_config"].llm_int8_enable_fp32_cpu_offload
    packed = placed(tiny_llama, "int4")
    assert packed["dtype"] == torch.bfloat16
    assert packed["quantization_config"].quant_type.int4_packing_format == "tile_packed_to_4d"
    with pytest.raises(ConfigurationError, match=r"in bfloat16 alone, not in torch\.float16"):
        placed(tiny_llama, "int4", dtype="float16")
    for capability, dtype, how in (
        ((9, 0), "bfloat16", "Float8DynamicActivationFloat8WeightConfig"),
        ((9, 0), "float16", "Float8WeightOnlyConfig"),
        ((8, 0), "bfloat16", "Float8WeightOnlyConfig"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, its=capability: its)
        found = placed(tiny_llama, "fp8", dtype=dtype)["quantization_config"].quant_type
        assert type(found).__name__ == how


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["8bit", "4bit", "fp8", "int8", "int4"])
async def test_weights_are_quantized_as_they_are_loaded(smollm2: Path, name: Any) -> None:
    worker = ModelWorker(TransformersOptions(model=str(smollm2), device="cuda", dtype="bfloat16", quantization=name))
    worker.steps = answers = Answers()
    (info,) = await worker.load()
    assert int(str(info.details["weight_bytes"])) < 2 * 134_515_008
    worker.begin(ask("a", "The capital of France is", temperature=0, max_new_tokens=8))
    await answers.until("a")
    await worker.close()
    assert "Paris" in answers.text("a")


def test_what_torchao_says_to_nobody_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchao
    from torch.utils import _pytree
    from torchao.quantization.quantize_.common import KernelPreference

    load, use = "Failed to load %s: %s", "%s is an Enum subclass and is now natively supported"
    # What is left out is what these releases say.
    assert 'logger.warning(f"Failed to load {' in Path(torchao.__file__).read_text()
    assert "is an Enum subclass and is now natively supported" in Path(_pytree.__file__).read_text()

    def seen(logger: str, message: str, *its: Any) -> bool:
        caplog.clear()
        logging.getLogger(logger).warning(message, *its)
        return bool(caplog.records)

    assert not seen(_pytree.log.name, use, KernelPreference)
    assert seen(_pytree.log.name, use, logging.Logger)
    assert seen(_pytree.log.name, "%s is no Enum", KernelPreference)
    assert seen(torchao.logger.name, "Skipping import of cpp extensions")
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert seen(torchao.logger.name, load, "_C_mxfp8.so", "no CUDA") is gpu
