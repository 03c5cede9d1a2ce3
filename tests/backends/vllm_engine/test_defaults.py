"""A model's own defaults are those that vLLM's server would draw by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zfabric.backends.vllm_engine import sampling
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.sampling import SamplingOptions

CONFIG = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "max_new_tokens": 7,
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generation_config": "vllm"},
        {"override_generation_config": {"temperature": 0.9, "min_p": 0.2}},
        {"generation_config": "vllm", "override_generation_config": {"presence_penalty": 1.5}},
        {"generation_config": "elsewhere"},
    ],
)
def test_they_are_those_of_its_server(tmp_path: Path, vllm_llama: Path, arguments: dict[str, Any]) -> None:
    from vllm.config import ModelConfig

    directory = tmp_path / "m"
    shutil.copytree(vllm_llama, directory)
    (directory / "generation_config.json").write_text(json.dumps(CONFIG))
    if arguments.get("generation_config") == "elsewhere":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "generation_config.json").write_text(json.dumps({"temperature": 0.25}))
        arguments = {"generation_config": str(tmp_path / "elsewhere")}
    settings = ModelConfig(model=str(directory), **arguments)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=settings, lora_config=None))
    found = sampling.defaults(engine)
    theirs = dict(settings.get_diff_sampling_param())
    theirs |= {"max_new_tokens": theirs.pop("max_tokens")} if "max_tokens" in theirs else {}
    assert found.parameters == theirs
    request = GenerateRequest(prompt="x", sampling=SamplingOptions(top_k=5, min_p=0.0).resolved(found.parameters))
    made = sampling.translate(request)
    assert made.temperature == theirs.get("temperature", 1.0)
    assert made.presence_penalty == theirs.get("presence_penalty", 0.0)
    assert (made.top_k, made.min_p) == (5, 0.0)
