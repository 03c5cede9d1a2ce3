"""Sparse attention, whose layers choose keys by an index that is kept beside them (DeepSeek V3.2): a part of each row."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.backends.test_beams import expected, search
from tests.backends.test_engine import Start, greedy, starting, together
from tests.backends.tiny import reference
from tests.sweep.subject import save
from zfabric.backends.hf_transformers.cache.kv_cache import KVCacheLayer
from zfabric.errors import OutOfMemoryError

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy dog", "a", "Once upon"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each column of it looks at eight keys, so its texts are longer than what it sees."""
    directory = tmp_path_factory.mktemp("deepseek_v32")
    torch.manual_seed(0)
    save("deepseek_v32", "causal", directory)
    return directory


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with starting(tmp_path, "auto") as start_one:
        yield start_one


async def test_rows_choose_among_their_own_keys(tiny: Path, start: Start) -> None:
    worker, answers = await start(model=str(tiny), max_batch_size=4, prefill_chunk_tokens=16)
    core: Any = worker._assembled.engine._core  # type: ignore[union-attr]
    # Room for two at first, and for one once they have grown.
    core._kv_tokens_max = 2 * 60
    await together(worker, answers, PROMPTS, 28)
    for prompt in PROMPTS:
        assert answers.tokens(prompt) == reference(tiny, prompt, 28)
    assert worker.load_report().gauges["preemptions"] > 0
    found = await search((worker, answers), "beams", "Hello you", n=2, best_of=3, max_new_tokens=10, ignore_eos=True)
    assert found == expected(tiny, "Hello you", 3, 2, max_new_tokens=10, eos_token_id=None)


async def test_memory_that_runs_out_for_an_index_leaves_keys_and_values_whole(
    tiny: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, answers = await start(model=str(tiny))
    replace, calls = KVCacheLayer._replace, []

    def once(layer: KVCacheLayer, parts: Any, columns: int) -> None:
        if len(parts) == 2:
            calls.append(layer)
            # Keys and values of two layers, the index of one.
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        replace(layer, parts, columns)

    worker.begin(greedy("old", "Hello", 40))
    await answers.until("old", tokens=2)
    monkeypatch.setattr(KVCacheLayer, "_replace", once)
    worker.begin(greedy("young", "A much longer prompt, so that the batch would become wider", 30))
    await answers.until("old", "young")
    assert isinstance(answers.errors["young"], OutOfMemoryError)
    assert answers.tokens("old") == reference(tiny, "Hello", 40)
    # An index has no values.
    assert [layer.values.shape[3] > 0 for layer in calls[:4]] == [True, False] * 2
