"""Keys and values in 8 bits: each text is what `generate` says over a cache that rounds what it is given, as is written here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

from tests.backends.test_architectures import FAMILIES, SIZES, save
from tests.backends.test_engine import PROMPTS, Start, greedy, starting
from tests.backends.test_paged import cached
from tests.backends.test_paged_attention import BLOCK, alone, scattered
from tests.backends.tiny import Answers, ask
from zfabric.backends.hf_transformers.cache import paged_pass
from zfabric.backends.hf_transformers.cache.narrow_pool import NarrowPool
from zfabric.backends.hf_transformers.cache.paged_attention import Pool, attend
from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass
from zfabric.backends.hf_transformers.options import Narrow, TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import ConfigurationError

KINDS: list[Narrow] = ["fp8", "int8"]


def rounded(vectors: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of vectors, (…, size)."""
    wide = vectors.float()
    if kind == "fp8":
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).to(vectors.dtype)
    scale = (vectors.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16).float().clamp(min=1e-30)
    return ((wide / scale).round().clamp(-127, 127) * scale).to(vectors.dtype)


@pytest_asyncio.fixture
async def start(tiny_llama: Path) -> AsyncIterator[Start]:
    async with starting(tiny_llama, "auto") as start_one:
        yield start_one


def generated(model: Path, prompt: str, count: int, kind: str) -> list[int]:
    """What `generate` makes of a prompt over rounded keys and values."""

    class Rounded(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(rounded(key_states, kind), rounded(value_states, kind), *args, **kwargs)

    raw = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt", return_token_type_ids=False)
    output = raw.generate(
        **inputs,
        past_key_values=Cache(layer_class_to_replicate=Rounded),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def pool_of(kind: Narrow, keys: torch.Tensor, values: torch.Tensor, block: int = BLOCK) -> NarrowPool:
    """A pool that holds these, (places, heads, size), at their places."""
    lined_keys, lined_values = (one.transpose(0, 1).unsqueeze(0) for one in (keys, values))

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=keys.device)

    pool = NarrowPool(kind, keys.shape[0], lined_keys, lined_values, block, allocate)
    order = torch.randperm(keys.shape[0], device=keys.device)
    pool.write(order, lined_keys[:, :, order], lined_values[:, :, order])
    return pool


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_rounded(kind: Narrow, dtype: torch.dtype) -> None:
    """From the smallest to what no 8 bits hold; and nothing is not a number."""
    torch.manual_seed(0)
    keys = (torch.randn(40, 3, 16) * torch.logspace(-6, 3, 40)[:, None, None]).to(dtype)
    values = torch.randn(40, 3, 8).to(dtype)
    keys[7], keys[8, 1], values[9, 0, 2] = 0, torch.finfo(dtype).tiny, 500
    pool = pool_of(kind, keys, values)
    for found, given in zip(pool.view(3, 40), (keys, values), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found[0].transpose(0, 1), rounded(given[3:40], kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["side by side", "anywhere"])
@pytest.mark.parametrize("gathered", [0, 4_000, 1 << 30], ids=["in place", "some", "all"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_size", [16, 8])
def test_each_row_sees_its_own_rounded(
    kind: Narrow, order: str, gathered: int, window: int | None, value_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_pass, "_GATHERED_BYTES_MAX", gathered)
    torch.manual_seed(0)
    counts, lengths = [1, 1, 1, 6, 3, 9], [1, 44, 9, 6, 11, 20]
    tables = scattered(lengths, 30, order)
    keys, values = torch.randn(30 * BLOCK, 2, 16), torch.randn(30 * BLOCK, 2, value_size)
    query = torch.randn(1, sum(counts), 6, 16).transpose(1, 2)
    found = attend(PagedPass(counts, lengths, tables, BLOCK), query, pool_of(kind, keys, values), 0.3, window)
    keys, values = rounded(keys, kind), rounded(values, kind)
    begin = 0
    for count, length, table in zip(counts, lengths, tables, strict=True):
        places = [table[place // BLOCK] * BLOCK + place % BLOCK for place in range(length)]
        expected = alone(query[0].transpose(0, 1)[begin : begin + count], keys[places], values[places], window, 0.3)
        torch.testing.assert_close(found[0, begin : begin + count], expected, atol=1e-5, rtol=1e-5)
        begin += count


def held(cache: PagedCache) -> int:
    """Bytes of its pools."""
    return sum(one.untyped_storage().nbytes() for pool in cache._pools.values() for one in pool.blocks)


def test_a_pool_takes_half_the_memory() -> None:
    """Of bfloat16; with int8 a scale of two bytes for each token and head comes beside."""
    states, sizes = torch.ones(1, 2, 8, 64, dtype=torch.bfloat16), {}
    for kind in (None, *KINDS):
        cache = PagedCache(30, BLOCK, kind)
        with cache.during([PagedPass([8], [8], [[0, 4]], BLOCK)], [torch.arange(8)]):
            cache.update(states, states, 0)
        sizes[kind] = held(cache)
    assert sizes["fp8"] * 2 == sizes[None]
    assert sizes["int8"] == sizes["fp8"] + 31 * BLOCK * 2 * 2 * 2


@pytest.mark.parametrize("kind", KINDS)
async def test_whatever_joins_shares_and_waits_each_text_is_its_own(start: Start, tiny_llama: Path, kind: str) -> None:
    worker, answers = await start(kv_cache_dtype=kind, kv_tokens_max=144, prefill_chunk_tokens=16)
    names = [f"{number} {prompt}" for number, prompt in enumerate(PROMPTS)]
    for name in names:
        worker.begin(greedy(name, name, 60))
    await answers.until(*names)
    assert worker.load_report().gauges["preemptions"] > 0
    for name in names:
        assert answers.tokens(name) == generated(tiny_llama, name, 60, kind)
    prompt = "What two rows begin with is computed once, and known to both of them."
    for name in ("first", "second"):
        worker.begin(greedy(name, prompt, 12))
        await answers.until(name)
        assert answers.tokens(name) == generated(tiny_llama, prompt, 12, kind)
    assert cached(answers, "second") > 0


async def test_choices_are_copied_with_their_scales(start: Start) -> None:
    """They share a prompt whose last block is begun, so each copies that."""
    worker, answers = await start(kv_cache_dtype="int8")
    worker.begin(ask("both", "Once upon", temperature=1.0, seed=3, n=2, max_new_tokens=12, ignore_eos=True))
    await answers.until("both")
    for index in range(2):
        single = f"single {index}"
        worker.begin(ask(single, "Once upon", temperature=1.0, seed=3, n=index + 1, max_new_tokens=12, ignore_eos=True))
        await answers.until(single)
        assert answers.tokens("both", index) == answers.tokens(single, index)


async def test_a_window_slides_over_rounded_keys(start: Start, tmp_path: Path) -> None:
    model = save(tmp_path, "MistralConfig", {**SIZES, **FAMILIES["MistralConfig"], "sliding_window": 8})
    worker, answers = await start(model=str(model), kv_cache_dtype="8bit")
    prompt = "A window that is shorter than its text"
    worker.begin(greedy("x", prompt, 30))
    await answers.until("x")
    assert answers.tokens("x") == generated(model, prompt, 30, "int8")


async def test_the_type_is_told_and_counted(tiny_llama: Path) -> None:
    """Two layers with two heads of keys and of values, each of 16 numbers, in the gigabyte that a CPU's cache has."""
    for told, stored, size in (("auto", None, 32), ("8bit", "int8", 18), ("int8", "int8", 18), ("fp8", "fp8", 16)):
        worker = ModelWorker(
            TransformersOptions(model=str(tiny_llama), device="cpu", dtype="bfloat16", kv_cache_dtype=cast(Any, told))
        )
        worker.steps = Answers()
        (info,) = await worker.load()
        await worker.close()
        assert info.details.get("kv_cache_dtype") == stored
        assert info.details["kv_tokens_max"] == 2**30 // (2 * 2 * 2 * size)


async def test_a_search_keeps_the_models_type_and_counts_by_it(start: Start, tiny_llama: Path) -> None:
    """Two layers with two heads of keys and of values, each of 16 numbers of 4 bytes, where pages have 16 and a scale of 2."""
    worker, answers = await start(kv_cache_dtype="int8", kv_tokens_max=400)
    prompt = len(AutoTokenizer.from_pretrained(tiny_llama)("Hello")["input_ids"])
    room = 400 * 18 // 64
    searched: dict[str, Any] = {"use_beam_search": True, "best_of": 2, "ignore_eos": True}
    worker.begin(ask("fits", "Hello", max_new_tokens=room // 2 - prompt, **searched))
    worker.begin(ask("large", "Hello", max_new_tokens=room // 2 - prompt + 1, **searched))
    await answers.until("fits", "large")
    assert len(answers.tokens("fits")) == room // 2 - prompt
    assert f"has room for {room}" in str(answers.errors["large"])


async def test_padded_rows_have_none(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="kv_cache_dtype 'fp8' goes with a paged cache, not a padded one"):
        await start(kv_cache="padded", kv_cache_dtype="fp8")
    model = save(tmp_path, "BloomConfig", {**SIZES, **FAMILIES["BloomConfig"]})
    with pytest.raises(ConfigurationError, match="cannot have keys and values in '8bit', which are for pages: "):
        await start(model=str(model), kv_cache_dtype="8bit")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_sees_what_the_cpu_sees(kind: Narrow) -> None:
    """Rows are gathered: the kernel that reads block tables takes the type that is computed in alone."""
    torch.manual_seed(0)
    counts, lengths, tables = [1, 1, 40], [700, 3, 600], [[4, 0, 6], [2], [5, 1, 3]]
    keys, values = torch.randn(7 * 256, 2, 64).bfloat16(), torch.randn(7 * 256, 2, 64).bfloat16()
    query = torch.randn(1, 8, sum(counts), 64).bfloat16()
    wide_keys, wide_values = (rounded(one, kind).float() for one in (keys, values))
    passed = PagedPass(counts, lengths, tables, 256)
    expected = attend(passed, query.float(), Pool(wide_keys, wide_values, 256), 0.125, None)
    query, keys, values = (one.to("cuda") for one in (query, keys, values))
    pool = pool_of(kind, keys, values, 256)
    found = attend(PagedPass(counts, lengths, tables, 256), query, pool, 0.125, None).float().cpu()
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)
