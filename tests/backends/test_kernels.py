"""What this backend puts in the place of transformers' own attention and linear layers: the same numbers, without the copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.integrations import sdpa_attention

from tests.backends.test_lora import adapters, save_adapter, to
from tests.backends.tiny import Answers, ask, reference
from zfabric.backends.hf_transformers.cache import attention
from zfabric.backends.hf_transformers.cache.attention import attend
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.parameters.lora import Lora
from zfabric.backends.hf_transformers.parameters.packing import PackedLinear, pack
from zfabric.backends.hf_transformers.runner.step_graphs import plain
from zfabric.backends.hf_transformers.scheduling.paged_core import PagedCore
from zfabric.backends.hf_transformers.worker import ModelWorker

__all__ = ["adapters"]  # a fixture
PROMPTS = ["Hello", "The quick brown fox", "a"]


def padded(rows: int, columns: int, width: int, kind: str) -> torch.Tensor:
    """A causal mask of rows that are padded on the left, by one column more each."""
    ends = torch.arange(width - columns, width).unsqueeze(1)
    places = torch.arange(width)
    mask = torch.stack([(places <= ends) & ((places >= row) | (places == ends)) for row in range(rows)]).unsqueeze(1)
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_attention_gives_what_transformers_gives(heads: tuple[int, int], columns: int, kind: str) -> None:
    torch.manual_seed(0)
    rows, width, size = 3, 12, 8
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    # As models make them: heads are behind columns in memory.
    query = torch.randn(rows, columns, heads[0], size).transpose(1, 2)
    key, value = (torch.randn(rows, heads[1], width + 3, size)[:, :, :width] for _ in range(2))
    mask = None if kind == "none" else padded(rows, columns, width, kind)
    options: dict[str, Any] = {"scaling": 0.3, "is_causal": mask is None}
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **options)
    output, weights = attend(module, query, key, value, mask, **options)
    assert weights is None
    assert output.shape == expected.shape == (rows, columns, heads[0], size)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_transformers_own_batching_still_works(tiny_llama: Path) -> None:
    """It hands its paged cache to the attention that this backend installs for the whole process."""
    attention.install()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=2)
    shape = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=64)
    prompts = {prompt: [token + 3 for token in prompt.encode()] for prompt in PROMPTS}
    results = model.generate_batch(
        list(prompts.values()), generation_config=settings, continuous_batching_config=shape, progress_bar=False
    )
    with torch.inference_mode():
        alone = [
            model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2)
            for tokens in prompts.values()
        ]
    assert sorted(result.generated_tokens for result in results.values()) == sorted(
        one[0, -8:].tolist() for one in alone
    )


async def test_a_padded_batch_copies_no_cache(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def repeat(states: torch.Tensor, count: int) -> torch.Tensor:
        raise AssertionError(f"{states.shape} is copied {count} times")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeat)
    options = TransformersOptions(
        model=str(tiny_llama), dtype="float32", device="cpu", prefill_chunk_tokens=8, kv_cache="padded"
    )
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    await worker.load()
    for prompt in PROMPTS:
        worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=20, ignore_eos=True))
    await answers.until(*PROMPTS)
    await worker.close()
    assert answers.largest_step > 1
    monkeypatch.undo()
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == reference(tiny_llama, prompt, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 70), (3, 20)])
def test_a_packed_layer_computes_the_same(dtype: torch.dtype, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(700, 600, bias=bias, dtype=dtype)
    model = torch.nn.Sequential(plain)
    given = torch.randn(*shape, 700, dtype=dtype)
    with torch.inference_mode():
        expected = model(given)
        assert pack(model) == 1
        output = model(given)
    packed = model[0]
    assert isinstance(packed, PackedLinear)
    assert (packed.in_features, packed.out_features) == (700, 600)
    assert packed.weight.dtype == output.dtype == dtype
    torch.testing.assert_close(output, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


def test_what_is_small_or_of_another_kind_stays() -> None:
    class Other(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), Other(700, 600), torch.nn.Linear(700, 600, dtype=torch.float64)
    )
    before = list(model)
    assert pack(model) == 0
    assert list(model) == before


async def test_the_real_model_is_packed_and_says_the_same(smollm2: Path) -> None:
    texts = []
    for packed in (False, True):
        options = TransformersOptions(
            model=str(smollm2), dtype="float32", device="cpu", context_length=256, pack_weights=packed
        )
        worker = ModelWorker(options)
        worker.steps = answers = Answers()
        await worker.load()
        assert worker._assembled is not None
        layers = [isinstance(layer, PackedLinear) for layer in worker._assembled.loaded.model.modules()]
        assert any(layers) == packed
        for prompt in PROMPTS:
            worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=12))
        await answers.until(*PROMPTS)
        texts.append([answers.text(prompt) for prompt in PROMPTS])
        await worker.close()
    assert texts[0] == texts[1]


def test_an_adapter_fits_a_packed_layer(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes what the layer makes as it changes that of a plain one."""
    adapter = save_adapter(tmp_path / "red", tiny_llama, 1)
    monkeypatch.setattr("zfabric.backends.hf_transformers.parameters.packing._WEIGHTS_MIN", 1)
    outputs = []
    for packed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
        assert not packed or pack(model) > 0
        lora = Lora(model)
        red = lora.read("red", adapter)
        lora.install(red)
        with torch.inference_mode(), lora.rows([red, None]):
            outputs.append(model(torch.tensor([[5, 6, 7], [5, 6, 7]])).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(outputs[1][0], outputs[1][1])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch needs a C++ compiler for this")
def test_packed_weights_can_be_compiled() -> None:
    torch.manual_seed(0)
    layer = PackedLinear(torch.nn.Linear(64, 32))
    with torch.inference_mode():
        compiled = torch.compile(layer, dynamic=True, fullgraph=True)
        given = torch.randn(1, 3, 64)
        torch.testing.assert_close(compiled(given), layer(given))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch needs a C++ compiler for this")
@pytest.mark.parametrize("kv_cache", ["padded", "paged"])
async def test_compiled_steps_say_the_same(
    tiny_llama: Path, adapters: dict[str, Path], kv_cache: Literal["padded", "paged"]
) -> None:
    """Rows join and leave, are padded and not, and the cache grows: nothing is compiled anew after the start."""
    flags = tuple(f"{name}={path}" for name, path in adapters.items())
    options = TransformersOptions(
        model=str(tiny_llama), dtype="float32", device="cpu", compile=True, lora=flags, kv_cache=kv_cache
    )
    worker = ModelWorker(options)
    worker.steps = answers = Answers()
    torch._dynamo.utils.counters.clear()
    await worker.load()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for number, prompt in enumerate(PROMPTS):
        worker.begin(ask(prompt, prompt, temperature=0, max_new_tokens=150 + 20 * number, ignore_eos=True))
    await answers.until(*PROMPTS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    if kv_cache == "paged":
        assert worker._assembled is not None
        core = worker._assembled.engine._core
        assert isinstance(core, PagedCore)
        # What a device records is what is compiled.
        worker._assembled.engine.run_job(lambda: core._runner.record(4, 512, plain)).result()
        worker.begin(ask("recorded", PROMPTS[0], temperature=0, max_new_tokens=40, ignore_eos=True))
        await answers.until("recorded")
        assert answers.tokens("recorded") == reference(tiny_llama, PROMPTS[0], 40)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    worker.begin(to("red", "changed"))
    worker.begin(to("", "base"))
    await answers.until("changed", "base")
    await worker.close()
    assert answers.tokens("changed") != answers.tokens("base")
    assert answers.largest_step > 1
    for number, prompt in enumerate(PROMPTS):
        assert answers.tokens(prompt) == reference(tiny_llama, prompt, 150 + 20 * number)
