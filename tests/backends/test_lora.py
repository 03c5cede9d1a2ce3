"""LoRA adapters: each row of a batch has its own, and they come and go while requests run."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from tests.backends.test_architectures import FAMILIES, save
from tests.backends.test_engine import hold, prepared
from tests.backends.tiny import Answers, ask
from tests.sweep.subject import save as save_of_kind
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError, FabricError, RequestError, UnknownModelError, UnsupportedOperationError
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import GenerateRequest, OperateRequest
from zfabric.wire.tasks import EmbedRequest

PROMPT = "Once upon a time"
LAYERS = [
    f"model.layers.{layer}.{module}"
    for layer in range(2)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


class Adapting(Answers):
    """A sink that notes which models are announced."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: list[list[str]] = []

    def models_changed(self, models: Sequence[ModelInfo]) -> None:
        self.announced.append([model.name for model in models])


def linear_layers(model: Any) -> list[str]:
    """Names of all layers that an adapter can change, the last one aside."""
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and "head" not in name]


def shape_of(module: Any) -> tuple[int, int]:
    """Values that a layer gives, and takes."""
    shape = module.weight.shape
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


def save_adapter(
    directory: Path, base: Path, seed: int, rank: int = 4, layers: Sequence[str] = LAYERS, **settings: Any
) -> Path:
    """A random adapter in the form that PEFT saves."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = {}
    for layer in layers:
        outputs, inputs = shape_of(model.get_submodule(layer))
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[f"base_model.model.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=generator) / 2
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merged(base: Path, adapter: Path | None, layers: Sequence[str] = LAYERS) -> Any:
    """The model with an adapter added to its weights, as the paper says: W + B A × alpha / r."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        for layer in layers:
            down, up = (tensors[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
            scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
            module = model.get_submodule(layer)
            change = up @ down * scale
            module.weight.data += change.T if isinstance(module, Conv1D) else change
    return model


def expected(base: Path, adapter: Path | None, count: int, layers: Sequence[str] = LAYERS) -> list[int]:
    ids = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")["input_ids"]
    output = merged(base, adapter, layers).generate(
        ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


def to(model: str, name: str, count: int = 20, **sampling: Any) -> GenerateRequest:
    request = ask(name, PROMPT, temperature=0, max_new_tokens=count, ignore_eos=True, **sampling)
    return structs.replace(request, model=model)


@pytest.fixture(scope="session")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "red": save_adapter(root / "red", tiny_llama, 1),
        "blue": save_adapter(root / "blue", tiny_llama, 2, rank=2, use_rslora=True),
    }


@pytest_asyncio.fixture
async def served(tiny_llama: Path, adapters: dict[str, Path]) -> AsyncIterator[tuple[ModelWorker, Adapting]]:
    """A worker with "red" from its start."""
    options = TransformersOptions(
        model=str(tiny_llama), model_names=("base",), dtype="float32", device="cpu", lora=(f"red={adapters['red']}",)
    )
    worker = ModelWorker(options)
    worker.steps = answers = Adapting()
    models = await worker.load()
    assert [model.name for model in models] == ["base", "red"]
    assert models[1].details["base"] == "base"
    yield worker, answers
    await worker.close()


def call(what: str, **arguments: Any) -> OperateRequest:
    return OperateRequest(call=what, arguments=arguments)


async def test_one_batch_serves_the_model_and_its_adapters(
    served: tuple[ModelWorker, Adapting], tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    worker, answers = served
    await worker.operate(call("load_adapter", name="blue", path=str(adapters["blue"])))
    assert answers.announced == [["base", "red", "blue"]]
    want = {"base": None, "red": adapters["red"], "blue": adapters["blue"]}
    gate = hold(worker)
    for model in want:
        worker.begin(to(model, model))
        worker.begin(to(model, f"{model} too", 24))
    await prepared(worker)
    gate.set()
    names = [name for model in want for name in (model, f"{model} too")]
    await answers.until(*names)
    assert answers.largest_step == 6
    for model, adapter in want.items():
        tokens = expected(tiny_llama, adapter, 24)
        assert answers.tokens(f"{model} too") == tokens
        assert answers.tokens(model) == tokens[:20]
    assert len({tuple(answers.tokens(model)) for model in want}) == 3


async def test_a_running_request_keeps_its_adapter(
    served: tuple[ModelWorker, Adapting], tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    worker, answers = served
    worker.begin(to("red", "running", 60))
    await answers.until("running", tokens=3)
    await worker.operate(call("load_adapter", name="red", path=str(adapters["blue"])))
    worker.begin(to("red", "new", 10))
    await answers.until("new")
    assert await worker.operate(call("unload_adapter", name="red")) == {}
    await answers.until("running")
    assert answers.tokens("running") == expected(tiny_llama, adapters["red"], 60)
    assert answers.tokens("new") == expected(tiny_llama, adapters["blue"], 10)
    assert answers.announced == [["base", "red"], ["base"]]


async def test_the_model_itself_does_not_answer_in_the_name_of_an_adapter_that_has_gone(
    served: tuple[ModelWorker, Adapting], adapters: dict[str, Path]
) -> None:
    worker, answers = served
    assert worker._assembled is not None
    await worker.operate(call("load_adapter", name="red", path=str(adapters["red"])))
    gate = threading.Event()
    # The input processor is busy with another prompt while the adapter goes.
    worker._assembled.engine._preparing.submit(gate.wait)
    worker.begin(to("red", "waiting", 5))
    embedding = EmbedRequest(inputs=["x"], model="red")
    await worker.operate(call("unload_adapter", name="red"))
    gate.set()
    await answers.until("waiting")
    assert isinstance(answers.errors["waiting"], UnknownModelError)
    with pytest.raises(UnknownModelError, match="red"):
        await worker.embed(embedding)


async def test_what_cannot_be_announced_is_not_there(
    served: tuple[ModelWorker, Adapting], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = served

    def refuse(_: Sequence[ModelInfo]) -> None:
        raise ConfigurationError("another model of this worker has the name")

    before = await worker.operate(call("list_adapters"))
    monkeypatch.setattr(answers, "models_changed", refuse)
    with pytest.raises(ConfigurationError, match="has the name"):
        await worker.operate(call("load_adapter", name="other", path=str(adapters["red"])))
    assert await worker.operate(call("list_adapters")) == before


async def test_an_adapter_cannot_be_started_under_the_models_name(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    options = TransformersOptions(
        model=str(tiny_llama), device="cpu", model_names=("base", "alias"), lora=(f"alias={adapters['red']}",)
    )
    with pytest.raises(RequestError, match="the model itself"):
        await ModelWorker(options).load()


async def test_vectors_are_made_with_the_adapter_that_is_named(
    served: tuple[ModelWorker, Adapting], tiny_llama: Path, adapters: dict[str, Path]
) -> None:
    worker, _ = served
    found = {}
    for model in ("base", "red"):
        result = await worker.embed(EmbedRequest(inputs=[PROMPT], model=model, normalize=False))
        found[model] = np.frombuffer(result.data, dtype="<f4")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(PROMPT, return_tensors="pt")["input_ids"]
    for model, adapter in (("base", None), ("red", adapters["red"])):
        with torch.inference_mode():
            hidden = merged(tiny_llama, adapter).model(ids).last_hidden_state[0]
        np.testing.assert_allclose(found[model], hidden.mean(dim=0).numpy(), atol=1e-4)


async def test_calls_say_what_is_wrong(served: tuple[ModelWorker, Adapting], adapters: dict[str, Path]) -> None:
    worker, answers = served
    listed = await worker.operate(call("list_adapters"))
    told = {"path": str(adapters["red"]), "base": "base", "rank": 4, "pinned": False, "in_use": 0}
    assert listed == {"red": told}
    wrong: list[tuple[OperateRequest, type[FabricError], str]] = [
        (call("dance"), UnsupportedOperationError, "dance"),
        (call("load_adapter", name="x"), RequestError, "path"),
        (call("load_adapter", name="base", path="x"), RequestError, "base"),
        (call("load_adapter", name="x", path="/nowhere"), RequestError, "nowhere"),
        (call("unload_adapter", name="green"), RequestError, "green"),
    ]
    for request, error, text in wrong:
        with pytest.raises(error, match=text):
            await worker.operate(request)
    assert answers.announced == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "peft_type")],
)
async def test_adapters_that_are_not_understood_are_refused(
    served: tuple[ModelWorker, Adapting], tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    worker, _ = served
    save_adapter(tmp_path / "odd", tiny_llama, 3, **settings)
    with pytest.raises(RequestError, match=reason):
        await worker.operate(call("load_adapter", name="odd", path=str(tmp_path / "odd")))


async def test_adapters_that_do_not_fit_are_refused(
    served: tuple[ModelWorker, Adapting], tiny_llama: Path, tmp_path: Path
) -> None:
    worker, _ = served
    save_adapter(tmp_path, tiny_llama, 3)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    for tensors, reason in (
        ({f"{layer}_A.weight": torch.zeros(4, 63), f"{layer}_B.weight": torch.zeros(64, 4)}, "64 values"),
        ({f"{layer}_A.weight": torch.zeros(4, 64)}, "no linear layer"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}, "lora_embedding_A"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(RequestError, match=reason):
            await worker.operate(call("load_adapter", name="odd", path=str(tmp_path)))


async def test_a_flag_of_another_form_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="name=path"):
        await ModelWorker(TransformersOptions(model=str(tiny_llama), device="cpu", lora=("red",))).load()


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_linear_layer_of_every_family_adapts(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "model", family, FAMILIES[family])
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(directory))
    adapter = save_adapter(tmp_path / "adapter", directory, 1, layers=layers)
    options = TransformersOptions(
        model=str(directory), model_names=("base",), dtype="float32", device="cpu", lora=(f"red={adapter}",)
    )
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    await worker.load()
    gate = hold(worker)
    for model in ("base", "red"):
        for number in range(2):
            worker.begin(to(model, f"{model} {number}", 12 + number))
    await prepared(worker)
    gate.set()
    await answers.until("base 0", "base 1", "red 0", "red 1")
    await worker.close()
    assert not answers.errors
    for model, chosen in (("base", None), ("red", adapter)):
        tokens = expected(directory, chosen, 13, layers)
        assert [answers.tokens(f"{model} {number}") for number in range(2)] == [tokens[:12], tokens]
    assert answers.tokens("base 0") != answers.tokens("red 0")


async def test_a_layer_that_the_model_reads_past_is_refused_unless_nothing_changes(tmp_path: Path) -> None:
    base = tmp_path / "mamba"
    base.mkdir()
    torch.manual_seed(0)
    save_of_kind("mamba", "causal", base)
    layers = ["backbone.layers.0.mixer.dt_proj", "backbone.layers.0.mixer.x_proj"]
    past = save_adapter(tmp_path / "past", base, seed=1, layers=layers)
    beside = save_adapter(tmp_path / "beside", base, seed=1, layers=layers)
    tensors = load_file(beside / "adapter_model.safetensors")
    tensors[f"base_model.model.{layers[0]}.lora_B.weight"].zero_()
    save_file(tensors, beside / "adapter_model.safetensors")
    worker = ModelWorker(TransformersOptions(model=str(base), dtype="float32", device="cpu", lora=(f"one={beside}",)))
    worker.steps = answers = Adapting()
    await worker.load()
    with pytest.raises(RequestError, match=r"'backbone.layers.0.mixer.dt_proj', which the model never calls"):
        await worker.operate(call("load_adapter", name="two", path=str(past)))
    worker.begin(to("one", "a"))
    await answers.until("a")
    await worker.close()
    assert answers.tokens("a") == expected(base, beside, 20, layers)
    assert answers.tokens("a") != expected(base, None, 20)
