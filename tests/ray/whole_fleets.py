"""What takes minutes: a fleet whose file changes under load, and vLLM's own executor over two nodes. Run by `make ray`."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.backends.tiny import save_llama
from tests.ray.cluster import FLEET, HEAD, WORKERS, RayCluster, followed, ray_cluster, rows, until
from tests.ray.load import Load
from zfabric import AsyncClient

#: Started when it is asked for, and gone when it is not; one that is in a placement group; and one with a GPU of two.
MORE = """
[workers.lazy.scale]
model = "lazy"
min = 0
max = 1
idle_s = 0
settle_s = 0

[workers.lazy.settings]
backend = "echo"
model_names = ["lazy"]

[workers.grouped]
environment = { ROUND = "1" }

[workers.grouped.settings]
backend = "echo"
model_names = ["grouped"]

[workers.grouped.ray]
bundles = [{ CPU = 1 }, { CPU = 1 }]
strategy = "STRICT_SPREAD"

[workers.seeing]
devices = ["7"]

[workers.seeing.settings]
backend = "echo"
model_names = ["seeing"]

[workers.seeing.ray]
num_cpus = 0
num_gpus = 1
"""
#: No node has these.
MISSING = """
[workers.missing.settings]
backend = "echo"

[workers.missing.ray]
num_gpus = 8
"""


@pytest.mark.timeout(400)
async def test_a_fleet_follows_its_file_and_its_load(run_directory: Path) -> None:
    file = run_directory / "fleet.toml"
    file.write_text(FLEET)
    async with ray_cluster('{"num_cpus": 1, "num_gpus": 2}', WORKERS, WORKERS, WORKERS) as cluster:
        assert (await cluster.zfabric("up", str(file)))[0] == 0
        before = await rows(cluster)
        assert {row["state"] for row in before.values()} == {"ready"}
        async with followed(cluster, run_directory / "endpoint") as endpoint, AsyncClient(endpoint) as client:
            await _a_workers_node_dies(cluster, client, before)
            await _the_file_changes(cluster, client, file)
            await _an_actor_is_ended(cluster, client)
        code, _, errors = await cluster.zfabric("down")
        assert code == 0
        assert set(errors.splitlines()) == {
            f"{name}: ended" for name in ("controller", "gateway", "echo-1", "grouped-1", "seeing-1")
        }
        code, _, errors = await cluster.zfabric("status")
        assert code == 2
        assert "no fleet runs in the namespace 'zfabric'" in errors


async def _a_workers_node_dies(cluster: RayCluster, client: AsyncClient, before: dict[str, dict[str, object]]) -> None:
    """Nobody notices, whatever else was on the node."""
    nodes = {str(before[name]["node"]) for name in ("echo-1", "echo-2", "gateway")}
    doomed = min(nodes - {str(before["controller"]["node"]), HEAD}, default=None)
    assert doomed is not None
    load = await Load.begin(client, 16)
    await cluster.kill(doomed)
    await load.end()

    async def all_are_back() -> bool:
        return {row["state"] for row in (await rows(cluster)).values()} == {"ready"}

    await until(all_are_back)


async def _the_file_changes(cluster: RayCluster, client: AsyncClient, file: Path) -> None:
    """One worker less, one in a placement group, a rule, and then one that no node has room for."""
    load = await Load.begin(client, 16)
    text = FLEET.replace("replicas = 2", "replicas = 1") + MORE
    file.write_text(text)
    code, output, errors = await cluster.zfabric("up", str(file))
    assert (code, output.split()[-1]) == (0, "processes=5"), errors
    # The worker that is too many has drained.
    await load.end()
    former = await rows(cluster)
    assert former.keys() == {"controller", "gateway", "echo-1", "grouped-1", "seeing-1"}
    # Which GPU says Ray, whatever the file has for one host.
    assert psutil.Process(former["seeing-1"]["pid"]).environ()["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    # The controller has learned the rule without a restart, and its actor follows it.
    assert (await client.generate("lazy", "hello", timeout=60)).text.startswith("hello")

    async def has_gone() -> bool:
        return {row.name for row in await client.workers()} == {"echo-1", "grouped-1", "seeing-1"}

    await until(has_gone)
    file.write_text(text.replace('ROUND = "1"', 'ROUND = "2"') + MISSING)
    code, _, errors = await cluster.zfabric("up", str(file), "--timeout", "20")
    assert code == 1
    assert "missing-1: waiting, it waits for CPU 1, GPU 8, and no node has CPU 1, GPU 8" in errors
    assert "after 20 s these are not ready: missing-1" in errors
    now = await rows(cluster)
    assert [name for name in former if former[name]["pid"] != now[name]["pid"]] == ["grouped-1"]
    file.write_text(text)
    assert (await cluster.zfabric("up", str(file)))[0] == 0


async def _an_actor_is_ended(cluster: RayCluster, client: AsyncClient) -> None:
    """By its process, its actor's process, or for good by somebody: it comes back."""
    for kill in ("process", "actor"):
        former = (await rows(cluster))["echo-1"]["pid"]
        victim = psutil.Process(former)
        (victim if kill == "process" else victim.parent() or victim).send_signal(signal.SIGKILL)

        async def is_another(former: int = former) -> bool:
            row = (await rows(cluster))["echo-1"]
            return bool(row["state"] == "ready" and row["pid"] != former)

        await until(is_another)
    assert (await client.generate("echo", "a", max_new_tokens=1)).text == "a "


#: A node without GPUs says that it has one, and vLLM's platform for CPUs that this is what it computes on.
_PRETEND = """
import importlib.abc, importlib.machinery, sys

class Pretend(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def patched(module):
            run(module)
            module.CpuPlatform.ray_device_key = "GPU"
            module.CpuPlatform.device_control_id_to_physical_device_id = classmethod(lambda _, name: int(name))

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Pretend())
"""
_VLLM = """
[controller]
public = true

[workers.big]
environment = { VLLM_CPU_KVCACHE_SPACE = "1", HF_HUB_OFFLINE = "1", OMP_NUM_THREADS = "1" }

[workers.big.settings]
backend = "vllm"
model = "MODEL"
model_names = "tiny"
dtype = "float32"
max_model_len = 512
block_size = 32
enforce_eager = true
tensor_parallel_size = 2

[workers.big.ray]
num_gpus = 2
strategy = "STRICT_SPREAD"
"""


@pytest.mark.timeout(600)
async def test_vllm_computes_on_two_nodes_by_its_own_executor(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model, half of each layer on each node, with the answer that it has on one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = save_llama(tmp_path, heads=2)
    (run_directory / "sitecustomize.py").write_text(_PRETEND)
    monkeypatch.setenv("PYTHONPATH", str(run_directory))
    file = run_directory / "fleet.toml"
    file.write_text(_VLLM.replace("MODEL", str(model)))
    node = '{"num_cpus": 1, "num_gpus": 1}'
    async with ray_cluster('{"num_cpus": 1}', node, node) as cluster:
        code, output, errors = await cluster.zfabric("up", str(file), "--timeout", "400")
        assert code == 0, errors
        endpoint = output.split()[1].partition("=")[2]
        prompt = [5, 6, 7, 8]
        async with AsyncClient(endpoint) as client:
            answer = await client.generate("tiny", prompt_token_ids=prompt, max_new_tokens=8, temperature=0.0)
        alone = AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            expected = alone.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert list(answer.token_ids) == expected.tolist()
        assert (await cluster.zfabric("down"))[0] == 0
