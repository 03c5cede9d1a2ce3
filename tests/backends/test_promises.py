"""What every backend owes, asked of the transformers worker: text, and vectors."""

from __future__ import annotations

from pathlib import Path

import zfabric.testing
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker


async def test_a_causal_model_keeps_every_promise(tiny_llama: Path) -> None:
    options = TransformersOptions(
        model=str(tiny_llama), model_names=("tiny",), dtype="float32", device="cpu", threads=1
    )
    (report,) = await zfabric.testing.conformance(ModelWorker(options), prompt="Once upon a time")
    assert sum(finding.kept is True for finding in report.findings) >= 17, str(report)


async def test_an_encoder_keeps_those_of_vectors(minilm: Path) -> None:
    options = TransformersOptions(model=str(minilm), model_names=("minilm",), device="cpu", threads=1)
    (report,) = await zfabric.testing.conformance(ModelWorker(options))
    assert any("vector" in finding.promise for finding in report.findings if finding.kept), str(report)
