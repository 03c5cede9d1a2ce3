"""Kernels for a CPU say what torch says, whoever runs beside them, and are left aside where they do not fit."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.test_decoder_layers import LAYERS, SIZES, made, said
from zfabric.backends.hf_transformers.cache import paged_attention
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass
from zfabric.backends.hf_transformers.cpu_kernels import available, calls
from zfabric.backends.hf_transformers.cpu_kernels.attention_kernel import space_bytes
from zfabric.backends.hf_transformers.runner.decoder_layers import shorten
from zfabric.backends.hf_transformers.runner.kernel_layer import KernelLayer

BLOCK = 16
DTYPES = (torch.float32, torch.bfloat16)
#: Of one rounding, beside numbers of size one; a bfloat16 has 8 bits.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
#: Large enough for the kernels, which take heads of 32 numbers at least.
WIDE = {**SIZES, "head_dim": 32}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As where kernels are used."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pool_of(heads: int, size: int, value_size: int, dtype: torch.dtype, blocks: int) -> paged_attention.Pool:
    keys, values = (torch.randn(blocks * BLOCK, heads, one).to(dtype) for one in (size, value_size))
    return paged_attention.Pool(keys, values, BLOCK)


def expected(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of one token, (heads, size), in float64, by its definition."""
    shared = query.shape[0] // keys.shape[1]
    keys, values = (one.double().repeat_interleave(shared, dim=1) for one in (keys, values))
    weights = (torch.einsum("hs,khs->hk", query.double(), keys) * scaling).softmax(dim=-1)
    return torch.einsum("hk,khs->hs", weights, values)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 8, 9, 11]),
    sizes=st.sampled_from([(16, 16), (64, 64), (48, 32), (32, 80)]),
    rows=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 12)), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 5, 100]),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_is_that_of_the_definition(
    seed: int,
    heads: int,
    group: int,
    sizes: tuple[int, int],
    rows: list[tuple[int, int]],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """Steps, short parts, and parts that torch computes, in one pass over shuffled blocks."""
    torch.manual_seed(seed)
    rows = sorted(((length, min(length, count)) for length, count in rows), key=lambda row: row[1])
    blocks = torch.randperm(sum(-(-length // BLOCK) for length, _ in rows)).tolist()
    pool = pool_of(heads, *sizes, dtype, len(blocks))
    tables = []
    for length, _ in rows:
        tables.append([blocks.pop() for _ in range(-(-length // BLOCK))])
    passed = PagedPass([count for _, count in rows], [length for length, _ in rows], tables, BLOCK)
    query = torch.randn(1, heads * group, sum(count for _, count in rows), sizes[0]).to(dtype)
    found = paged_attention.attend(passed, query, pool, 0.3, window)[0]
    token = 0
    for (length, count), table in zip(rows, tables, strict=True):
        lie = torch.tensor([table[place // BLOCK] * BLOCK + place % BLOCK for place in range(length)])
        for end in range(length - count + 1, length + 1):
            seen = lie[max(0, end - window) if window else 0 : end]
            told = expected(query[0, :, token], pool.keys[seen], pool.values[seen], 0.3)
            assert (found[token].double() - told).abs().max() < CLOSE[dtype] * (4 if dtype is torch.bfloat16 else 1)
            token += 1


def attended(query: torch.Tensor, pool: paged_attention.Pool, length: int) -> torch.Tensor:
    """Of a step of one row, (heads, size)."""
    passed = PagedPass([1], [length], [list(range(-(-length // BLOCK)))], BLOCK)
    return paged_attention.attend(passed, query, pool, 1.0, None)[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow_and_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    pool = pool_of(1, 16, 16, dtype, 20)
    query = torch.full((1, 2, 1, 16), 100.0).to(dtype)
    pool.keys[:] = -100.0
    pool.keys[[5, 250]] = 100.0
    found = attended(query, pool, 300)
    assert torch.allclose(found.float(), ((pool.values[5] + pool.values[250]) / 2).float(), atol=CLOSE[dtype])
    pool.keys[250] = math.nan
    assert attended(query, pool, 300).isnan().all()
    pool.keys[250], pool.values[5, 0, 3] = 1.0, math.nan
    assert attended(query, pool, 300).isnan()[:, 3].all()


def test_a_token_is_the_same_whoever_is_beside_it() -> None:
    """Torch's own kernels add up in another order when a batch has another size."""
    pool, query = pool_of(2, 32, 32, torch.bfloat16, 64), torch.randn(1, 6, 8, 32).to(torch.bfloat16)
    lengths = [30, 1, 100, 77, 16, 17, 90, 2]
    tables = [[row * 8 + index for index in range(8)] for row in range(8)]
    together = paged_attention.attend(PagedPass([1] * 8, lengths, tables, BLOCK), query, pool, None, None)
    for row in range(8):
        passed = PagedPass([1], lengths[row : row + 1], tables[row : row + 1], BLOCK)
        alone = paged_attention.attend(passed, query[:, :, row : row + 1], pool, None, None)
        assert torch.equal(alone[0, 0], together[0, row])


def test_threads_do_not_disturb_one_another() -> None:
    """A kernel holds no lock of the interpreter, and has its own memory until it is done."""
    pool = pool_of(2, 64, 64, torch.float32, 40)
    queries = [torch.randn(1, 8, 1, 64) for _ in range(16)]
    alone = [attended(query, pool, 600) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            together = list(threads.map(lambda query: attended(query, pool, 600), queries))
            assert all(map(torch.equal, together, alone))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), size=st.sampled_from([16, 64, 576]), added=st.booleans())
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_transformers(dtype: torch.dtype, seed: int, rows: int, size: int, added: bool) -> None:
    torch.manual_seed(seed)
    states, more, weight = (torch.randn(shape).to(dtype) for shape in ((1, rows, size), (1, rows, size), (size,)))
    whole = states + more if added else states.clone()
    wide = whole.float()
    told = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    found = calls.add_and_norm(states, more if added else None, weight, 1e-5)
    assert torch.equal(states, whole)
    assert_close(found, told)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), scale=st.sampled_from([1.0, 50.0, 1000.0]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_those_of_torch(dtype: torch.dtype, seed: int, rows: int, scale: float) -> None:
    torch.manual_seed(seed)
    both = (torch.randn(1, rows, 2 * 96) * scale).to(dtype)
    one, other = both.chunk(2, dim=-1)
    assert_close(calls.gate(both), torch.nn.functional.silu(one) * other)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 5), heads=st.integers(1, 3), normed=st.booleans())
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_turned_and_written(dtype: torch.dtype, seed: int, tokens: int, heads: int, normed: bool) -> None:
    torch.manual_seed(seed)
    size, group = 32, 2
    given_heads = torch.randn(tokens, heads * (group + 2), size).to(dtype)
    cosines, sines = (torch.randn(1, tokens, size).to(dtype) for _ in range(2))
    norms = (torch.randn(size).to(dtype), torch.randn(size).to(dtype)) if normed else None
    pool = pool_of(heads, size, size, dtype, 2)
    slots = torch.randperm(2 * BLOCK)[:tokens]
    queries, keys, values = given_heads.clone().split([heads * group, heads, heads], dim=1)
    if norms is not None:
        queries = calls.add_and_norm(queries.contiguous(), None, norms[0], 1e-6)
        keys = calls.add_and_norm(keys.contiguous(), None, norms[1], 1e-6)
    before = pool.keys.clone(), pool.values.clone()
    calls.turn_and_write(given_heads, (cosines, sines), slots, pool.keys, pool.values, norms, 1e-6)

    def turned(vectors: torch.Tensor) -> torch.Tensor:
        first, second = vectors.chunk(2, dim=-1)
        halves = torch.cat((-second, first), dim=-1)
        return vectors * cosines[0].unsqueeze(1) + halves * sines[0].unsqueeze(1)

    assert torch.equal(given_heads[:, : heads * group], turned(queries))
    assert torch.equal(pool.keys, before[0].index_copy(0, slots, turned(keys)))
    assert torch.equal(pool.values, before[1].index_copy(0, slots, values))


def assert_close(found: torch.Tensor, told: torch.Tensor) -> None:
    """But for the order of a sum and the last place of a root or an exponential, and what rounding makes of that."""
    assert found.dtype is told.dtype
    assert found.shape == told.shape
    places = 8 if told.dtype is torch.float32 else 2
    bound = torch.finfo(told.dtype).eps * places * told.float().abs() + 1e-30
    assert ((found.float() - told.float()).abs() <= bound).all()


class Counted:
    """Calls of the kernels' layers that did something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = KernelLayer.forward

        def forward(its: KernelLayer, *given: Any) -> Any:
            made = plain(its, *given)
            self.count += made is not None
            return made

        monkeypatch.setattr(KernelLayer, "forward", forward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_layers_say_the_same(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(kind, dtype, sizes=WIDE)
    told = said(model)
    assert shorten(model) == LAYERS
    counted = Counted(monkeypatch)
    found = said(model)
    # The first pass makes the pool.
    assert counted.count == 3 * LAYERS
    for one, other in zip(found, told, strict=True):
        assert (one - other).abs().max() < 4 * CLOSE[dtype]


def test_layers_of_another_form_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms add one to their weights, and its gate is another; half numbers and narrow heads have no kernels."""
    counted = Counted(monkeypatch)
    for model in (made("gemma", sizes=WIDE), made("llama", torch.float16, sizes=WIDE), made("llama")):
        assert shorten(model) == LAYERS
        said(model)
    assert not counted.count


def test_who_watches_a_norm_sees_it_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("qwen3", sizes=WIDE)
    shorten(model)
    counted, seen = Counted(monkeypatch), []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *given: seen.append(given[0]))
    found = said(model)
    assert len(seen) == len(found)
    assert counted.count == 3 * (LAYERS - 1)


def test_numbers_of_another_type_are_not_taken_for_what_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose hooks give float32 are rounded first, and cosines of float32 leave the layer to torch."""
    hooked = made("llama", torch.bfloat16, sizes=WIDE)
    told = said(hooked)
    shorten(hooked)
    layer = hooked.model.layers[0]
    for product in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
        # The first pass is torch's, which would refuse them.
        passes = itertools.count()
        product.register_forward_hook(lambda _, __, output, its=passes: output.float() if next(its) else output)
    counted = Counted(monkeypatch)
    found = said(hooked)
    assert counted.count == 3 * LAYERS
    turning = hooked.model.rotary_emb
    plain = turning.forward
    monkeypatch.setattr(
        turning, "forward", lambda *given, **named: tuple(one.float() for one in plain(*given, **named))
    )
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        said(hooked)
    assert counted.count == 3 * LAYERS
    for one, other in zip(found, told, strict=True):
        assert (one - other).abs().max() < 4 * CLOSE[torch.bfloat16]


def test_many_threads_and_a_switch_leave_all_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available.kernels() is calls
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert available.kernels() is None
    code = "from zfabric.backends.hf_transformers.cpu_kernels import available; print(available.kernels())"
    without = {"numba is missing": "import sys; sys.modules['numba'] = None; ", "NUMBA_DISABLE_JIT": ""}
    for name, before in without.items():
        environment = {"NUMBA_DISABLE_JIT": "1"} if not before else {}
        assert run(before + code, **environment).stdout == "None\n", name


def test_a_folder_that_cannot_be_written_to_costs_no_answer(tmp_path: Path) -> None:
    """As in a container whose files are read-only: what is compiled is not kept."""
    file = tmp_path / "file"
    file.touch()
    code = (
        "import torch; from zfabric.backends.hf_transformers.cpu_kernels import calls; "
        "print(calls.gate(torch.ones(1, 32)).sum().item())"
    )
    for cache, kept in ((file, False), (tmp_path / "cache", True)):
        told = run(code, ZFABRIC_CACHE=str(cache))
        assert math.isclose(float(told.stdout), 16 / (1 + math.exp(-1)), rel_tol=1e-6), told.stderr
        assert any(cache.rglob("*.nbi")) is kept


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1); " + code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip


def test_the_kernel_asks_for_the_memory_that_it_writes() -> None:
    """Scores of a stretch, queries, sums and two numbers for each query, and the way to the next line of a cache."""
    assert space_bytes(2, 64, 32) == 2 * (128 + 64 + 32 + 2) * 4 + 64
