"""A placement group of a Ray cluster on its way to vLLM's executor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.backends.vllm_engine.conftest import TINY
from zfabric.backends.vllm_engine import arguments
from zfabric.backends.vllm_engine.compat import placement

#: Two GPUs, on two nodes or one; the last --distributed-executor-backend counts.
ON_RAY = [*TINY, "--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]


class Group:
    """Stands for what Ray has made."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines are started with, none of which starts: configurations where there is a group, else arguments."""
    from vllm.v1.engine.async_llm import AsyncLLM

    found: list[Any] = []
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", lambda given, **_: found.append(given))
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda given, **_: found.append(given))
    return found


def engine(model: Path, *argv: str) -> Any:
    return arguments.parse(["--model", str(model), *argv], {}).engine


def test_an_executor_on_ray_gets_the_group_of_its_worker(
    vllm_llama: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own executor takes it from there, and asks for no other."""
    group = Group()
    monkeypatch.setattr(placement, "placement_group", lambda: group)
    placement.start_engine(engine(vllm_llama, *ON_RAY), [])
    (configuration,) = started
    parallel = configuration.parallel_config
    assert parallel.placement_group is group
    assert (parallel.world_size, parallel.distributed_executor_backend) == (2, "ray")
    assert parallel.use_ray


@pytest.mark.parametrize("argv", [TINY, ON_RAY])
def test_without_a_group_vllm_is_started_as_ever(vllm_llama: Path, started: list[Any], argv: list[str]) -> None:
    given = engine(vllm_llama, *argv)
    placement.start_engine(given, [])
    assert started == [given]


def test_the_group_is_found_by_its_name_in_the_cluster_of_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    group = Group()
    calls: list[Any] = []

    def connect(**options: Any) -> None:
        calls.append(options)

    def found(name: str) -> Group:
        calls.append(name)
        return group

    monkeypatch.setattr(ray, "init", connect)
    monkeypatch.setattr(ray.util, "get_placement_group", found)
    assert placement.placement_group() is None
    monkeypatch.setenv(placement.GROUP_VARIABLE, "big-1")
    monkeypatch.setenv(placement.NAMESPACE_VARIABLE, "chat")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert placement.placement_group() is group
    options, name = calls
    assert (options["address"], options["namespace"], name) == ("10.0.0.1:6379", "chat", "big-1")


@pytest.mark.gpu
def test_an_executor_on_ray_computes_on_a_gpu(vllm_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of this host's own GPUs, as many as there are, up to two."""
    import ray
    import torch
    from vllm import SamplingParams

    count = min(2, torch.cuda.device_count())
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(namespace="test", include_dashboard=False, log_to_driver=False)
    try:
        group = ray.util.placement_group([{"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0}][:count], name="big-1")
        ray.get(group.ready(), timeout=60)
        monkeypatch.setenv(placement.GROUP_VARIABLE, "big-1")
        argv = ["--enforce-eager", "--max-model-len", "512", "--tensor-parallel-size", str(count)]
        made = placement.start_engine(engine(vllm_llama, *argv, "--distributed-executor-backend", "ray"), [])

        async def tokens() -> list[int]:
            async for output in made.generate({"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=3), "1"):
                last = output
            return list(last.outputs[0].token_ids)

        assert len(asyncio.run(tokens())) == 3
        made.shutdown()
    finally:
        ray.shutdown()
