"""Attention over pages against torch's own of each row alone: in place, gathered, in parts, with windows and shared heads."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from zfabric.backends.hf_transformers.cache import paged_pass
from zfabric.backends.hf_transformers.cache.paged_attention import Pool, attend
from zfabric.backends.hf_transformers.cache.paged_cache import PagedCache
from zfabric.backends.hf_transformers.cache.paged_pass import PagedPass, StepTables

BLOCK = 4


def alone(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float
) -> torch.Tensor:
    """The last queries of one row, (tokens, heads, size), over all of its keys."""
    count, length = query.shape[0], key.shape[0]
    places, ends = torch.arange(length), torch.arange(length - count, length).unsqueeze(1)
    mask = places <= ends
    if window is not None:
        mask &= ends - places < window
    shared = query.shape[1] // key.shape[1]
    keys, values = (one.transpose(0, 1).repeat_interleave(shared, dim=0) for one in (key, value))
    scores = (query.transpose(0, 1) @ keys.transpose(1, 2) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(dim=-1) @ values).transpose(0, 1)


def scattered(lengths: list[int], blocks: int, order: str) -> list[list[int]]:
    """Tables of rows whose blocks lie side by side, or anywhere."""
    numbers = list(range(blocks))
    if order == "anywhere":
        numbers = torch.randperm(blocks).tolist()
    tables = []
    for length in lengths:
        count = -(-length // BLOCK)
        tables.append(numbers[:count])
        numbers = numbers[count:]
    return tables


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("order", ["side by side", "anywhere"])
@pytest.mark.parametrize("gathered", [0, 1_000, 1 << 30], ids=["in place", "some", "all"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_size", [16, 8])
def test_each_row_sees_its_own(
    heads: tuple[int, int],
    order: str,
    gathered: int,
    window: int | None,
    value_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_pass, "_GATHERED_BYTES_MAX", gathered)
    torch.manual_seed(0)
    counts, lengths = [1, 1, 1, 6, 3, 9], [1, 44, 9, 6, 11, 20]
    tables = scattered(lengths, 30, order)
    passed = PagedPass(counts, lengths, tables, BLOCK)
    keys, values = torch.randn(30 * BLOCK, heads[1], 16), torch.randn(30 * BLOCK, heads[1], value_size)
    query = torch.randn(1, sum(counts), heads[0], 16).transpose(1, 2)
    found = attend(passed, query, Pool(keys, values, BLOCK), 0.3, window)
    assert found.shape == (1, sum(counts), heads[0], value_size)
    begin = 0
    slots = passed.slots()
    for count, length, table in zip(counts, lengths, tables, strict=True):
        places = [table[place // BLOCK] * BLOCK + place % BLOCK for place in range(length)]
        assert slots[begin : begin + count] == places[length - count :]
        expected = alone(query[0].transpose(0, 1)[begin : begin + count], keys[places], values[places], window, 0.3)
        torch.testing.assert_close(found[0, begin : begin + count], expected, atol=1e-5, rtol=1e-5)
        begin += count


def test_tables_of_a_step_are_those_of_its_rows() -> None:
    """Whatever grew, came or went since the step before."""
    kept, cpu = StepTables(), torch.device("cpu")
    first, second, third = [4, 5], [9], [1, 2, 3]
    steps = [[first, second], [first, second], [first, second], [first, third], [third], [third, second]]
    for number, tables in enumerate(steps):
        second.append(20 + number)
        index, width = kept.of(tables, cpu)
        found = index.view(len(tables), width).tolist()
        assert [row[: len(table)] for row, table in zip(found, tables, strict=True)] == tables


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what memory a process has")
def test_a_pool_takes_memory_as_its_blocks_are_written_to() -> None:
    cache = PagedCache(2**16, BLOCK)
    states = torch.ones(1, 2, 2 * BLOCK, 1_024)
    before = resident()
    with cache.during([PagedPass([2 * BLOCK], [2 * BLOCK], [[0, 40_000]], BLOCK)], [torch.arange(2 * BLOCK)]):
        cache.update(states, states, 0)
    assert resident() - before < 2**16 * BLOCK * states.shape[1] * states.shape[3] * 4 // 8


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_sees_what_the_cpu_sees(window: int | None, dtype: torch.dtype) -> None:
    """In half precision by the kernel that reads block tables, else gathered."""
    torch.manual_seed(0)
    counts, lengths, tables = [1, 1, 40], [700, 3, 600], [[4, 0, 6], [2], [5, 1, 3]]
    keys, values = torch.randn(7 * 256, 2, 64), torch.randn(7 * 256, 2, 64)
    query = torch.randn(1, 8, sum(counts), 64)
    expected = attend(PagedPass(counts, lengths, tables, 256), query, Pool(keys, values, 256), 0.125, window)
    query, keys, values = (one.to("cuda", dtype) for one in (query, keys, values))
    found = attend(PagedPass(counts, lengths, tables, 256), query, Pool(keys, values, 256), 0.125, window).float().cpu()
    torch.testing.assert_close(
        found, expected, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=1e-4 if dtype == torch.float32 else 3e-2
    )
