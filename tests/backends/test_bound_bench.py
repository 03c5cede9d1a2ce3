"""What the benchmark says of steps against the memory's bandwidth."""

from __future__ import annotations

import asyncio

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from bench.engines import transformers_bound
from bench.engines.transformers_bound import against_bound, measure, weight_bytes
from tests.backends.test_engine import Served
from zfabric.backends.hf_transformers.worker import ModelWorker


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_as_a_step_reads_them(tied: bool) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tied))
    # Four square matrices of attention, three of 8 x 16, three norms, and a head, which an embedding may be as well.
    assert weight_bytes(model) == 4 * (4 * 8 * 8 + 3 * 8 * 16 + 3 * 8 + 50 * 8)


def test_a_step_is_held_against_what_it_reads() -> None:
    figures = against_bound([0.002, 0.002, 0.005], 8, 1e6, 1e9, 0.0045)
    assert figures == {
        "tokens_per_s": 4_000.0,
        "step_ms": 2.0,
        "bound_ms": 1.0,
        "step_by_bound": 2.0,
        "host_share": 0.5,
    }
    assert against_bound([0.002], 8, 1e6, 1e9, None)["host_share"] is None


async def test_steps_of_a_worker_are_measured(tiny_worker: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_bound, "_COPIED_BYTES", {"cpu": 1 << 20})
    worker, _ = tiny_worker
    assert isinstance(worker, ModelWorker)
    assert worker._assembled is not None
    engine, model = worker._assembled.engine, worker._assembled.loaded.model
    found = await asyncio.to_thread(measure, engine, model, 4, (1, 3, 10_000))
    assert found.keys() == {"bandwidth_gb_per_s", "weights_mb", "1_streams", "3_streams"}
    assert found["weights_mb"] == round(sum(one.numel() for one in model.parameters()) * 4e-6 - 259 * 64 * 4e-6, 3)
    for name in ("1_streams", "3_streams"):
        figures = found[name]
        assert figures["host_share"] is None
        assert figures["bound_ms"] > 0
        assert figures["step_by_bound"] == pytest.approx(figures["step_ms"] / figures["bound_ms"], rel=0.2)
    assert not engine.running
