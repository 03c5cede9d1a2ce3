"""zfabric ray: what a fleet's file asks of a cluster, and what is told before there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.document.commands import blocks_of
from tests.document.pages import ROOT
from zfabric.cli import main
from zfabric.cli.on_ray.placing import Placement, RayPlan, lacking
from zfabric.fleet.config import parse

PAGE = [block.body for block in blocks_of(ROOT / "docs" / "fleet.md") if block.language == "toml"]
CONTROLLER = "[controller]\npublic = true\n"
ECHO = "[workers.a.settings]\nbackend = 'echo'\n"
VLLM = "[workers.a.settings]\nbackend = 'vllm'\nmodel = '/m'\n"
RAY = ["--distributed-executor-backend", "ray"]


def plan(text: str) -> RayPlan:
    return RayPlan(parse(text, "fleet.toml"), Path("/srv/fleet"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[controller]\n", "controller.public: other nodes have to reach the controller"),
        (f"[fleet]\nendpoint = 'tcp://127.0.0.1:9000'\n{CONTROLLER}", "fleet.endpoint: Ray says on which node"),
        (f"[fleet]\nendpoint = 'ipc:///tmp/c.sock'\n{ECHO}", "fleet.endpoint: without [controller] it must be a tcp"),
        (f"{CONTROLLER}[workers.a]\ndevices = ['0']\n{ECHO}", "workers.a.devices: Ray says which GPUs"),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\nnum_gpus = 1.5", "workers.a.ray.num_gpus: 1.5 is neither"),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\nnum_gpus = -1", "workers.a.ray.num_gpus: Expected "),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\ngpus = 1", 'workers.a.ray: Object contains unknown field "gpus"'),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\nnum_gpus = 1\nbundles = [{{CPU = 1}}]", "num_gpus: bundles say what"),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\nbundles = [{{GPU = 1}}]", "the first has CPU 0, its process needs 1"),
        (f"{CONTROLLER}{ECHO}[workers.a.ray]\nbundles = [{{CPU = 1}}, {{}}]", "a bundle has at least one resource"),
        (f"{CONTROLLER}{VLLM}tensor_parallel_size = 2", "workers.a.ray: vLLM is to run on 2 GPUs, and 0 are asked for"),
        (
            f"{CONTROLLER}[workers.a]\narguments = ['-tp', '2', '--pipeline-parallel-size=2']\n{VLLM}"
            "[workers.a.ray]\nnum_gpus = 2",
            "vLLM is to run on 4 GPUs, and 2 are asked for",
        ),
        (f"{CONTROLLER}{ECHO}slots = 'many'", "workers.a.settings.slots: "),
        (f"{CONTROLLER}[ray]\nport = 70000", "ray.port: Expected "),
    ],
)
def test_what_cannot_be_is_told_with_its_key_before_a_cluster_is_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    assert main.main(["ray", "up", str(file), "--check"]) == 2
    assert told in capfd.readouterr().err


def test_a_file_serves_one_host_and_a_cluster(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the tables for Ray say is passed over by `zfabric up`."""
    (shown,) = (text for text in PAGE if "[ray" in text)
    file = tmp_path / "fleet.toml"
    file.write_text(shown)
    for command in (["ray", "up"], ["up"]):
        assert main.main([*command, str(file), "--check"]) == 0
        assert "can be used: controller, chat-1, chat-2, big-1, gateway" in capfd.readouterr().out


def test_each_process_has_what_it_needs_and_no_endpoint() -> None:
    made = plan(
        f"{CONTROLLER}{ECHO}[workers.a]\ndevices = ['3']\n[workers.a.ray]\nnum_gpus = 0.5\nresources = {{ fast = 1 }}\n"
        "[gateway]\n[ray]\ndirectory = '/srv/nodes'\n[ray.controller]\nnum_cpus = 2\n"
    )
    controller, worker, gateway = made.all()
    assert [command.name for command in made.all()] == ["controller", "a-1", "gateway"]
    assert not any("--endpoint" in command.arguments for command in made.all())
    assert {command.directory for command in made.all()} == {Path("/srv/nodes")}
    placements = [command.placement for command in (made.controller(), made.worker("a", 0), made.gateway()) if command]
    assert placements == [
        Placement(num_cpus=2.0),
        Placement(num_cpus=1.0, num_gpus=0.5, resources={"fast": 1.0}),
        Placement(),
    ]
    # Which GPU it is says Ray.
    assert worker.environment == {}
    assert made.worker("a", 0) == worker
    assert controller != gateway
    # Without a controller of its own it joins one, whose endpoint is known.
    joining = plan(f"[fleet]\nendpoint = 'tcp://10.0.0.1:9000'\n{ECHO}")
    assert joining.worker("a", 0).arguments[:2] == ("--endpoint", "tcp://10.0.0.1:9000")


def test_vllm_on_several_gpus_gets_a_bundle_for_each_and_its_executor_on_ray() -> None:
    several = "[workers.a.ray]\nnum_gpus = 4\nstrategy = 'STRICT_PACK'\n"
    worker = plan(f"{CONTROLLER}{VLLM}tensor_parallel_size = 4\n{several}").worker("a", 0)
    assert list(worker.arguments[-2:]) == RAY
    # The process itself is in the first bundle, and vLLM's actors take the GPUs.
    assert worker.placement == Placement(
        bundles=({"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}), strategy="STRICT_PACK"
    )
    said = plan(f"{CONTROLLER}{VLLM}distributed_executor_backend = 'ray'\n{several}").worker("a", 0)
    assert said.arguments.count("--distributed-executor-backend") == 1
    given = plan(f"{CONTROLLER}{VLLM}[workers.a.ray]\nbundles = [{{CPU = 2, GPU = 1}}, {{GPU = 1}}]\n").worker("a", 0)
    assert given.placement.bundles == ({"CPU": 2.0, "GPU": 1.0}, {"GPU": 1.0})
    assert list(given.arguments[-2:]) == RAY


@pytest.mark.parametrize("text", ["distributed_executor_backend = 'mp'\n[workers.a.ray]\nnum_gpus = 4\n", "", ECHO])
def test_all_others_are_given_their_gpus_themselves(text: str) -> None:
    worker = plan(CONTROLLER + (text if text == ECHO else VLLM + text)).worker("a", 0)
    assert worker.placement == Placement(num_gpus=4.0 if "num_gpus" in text else 0.0)
    assert RAY[1] not in worker.arguments


BUNDLES = ({"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0})


@pytest.mark.parametrize(
    ("placement", "nodes", "free", "told"),
    [
        (Placement(num_gpus=4), [{"CPU": 8}, {"CPU": 2, "GPU": 2}], {}, "CPU 1, GPU 4, and no node has CPU 1, GPU 4"),
        (Placement(resources={"fast": 1}), [{"CPU": 8}], {}, "CPU 1, fast 1, and no node has CPU 1, fast 1"),
        (Placement(num_cpus=0), [{"CPU": 8}], {"CPU": 8}, "it waits for nothing, and there is room for it"),
        (Placement(), [{"CPU": 2}, {"CPU": 2}], {"CPU": 0.5}, "it waits for CPU 1; free is CPU 0.5 of 4"),
        (Placement(), [], {}, "it waits for CPU 1, and no node has CPU 1"),
        (
            Placement(bundles=(*BUNDLES, {"GPU": 1.0})),
            [{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}],
            {"CPU": 4, "GPU": 2},
            "CPU 1, GPU 1 and 2 times GPU 1, and all nodes together have GPU 2",
        ),
        (
            Placement(bundles=BUNDLES, strategy="STRICT_PACK"),
            [{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}],
            {},
            "it waits for CPU 1, GPU 2, and no node has CPU 1, GPU 2",
        ),
        (
            Placement(bundles=BUNDLES, strategy="STRICT_SPREAD"),
            [{"CPU": 2, "GPU": 2}],
            {},
            "CPU 1, GPU 1 and GPU 1, each on a node of its own, and there is 1 node",
        ),
    ],
)
def test_what_a_process_waits_for_is_told(
    placement: Placement, nodes: list[dict[str, float]], free: dict[str, float], told: str
) -> None:
    assert told in lacking(placement, nodes, free)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main.main(["ray", "status"]) == 2
    assert "install it with: pip install 'zfabric[ray]'" in capfd.readouterr().err


def test_without_a_cluster_the_way_to_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    def nobody(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address, told in (
        ([], "on this host: Could not find any running Ray instance;"),
        # Ray would try that again for minutes.
        (["--address", "127.0.0.1:1"], "at 127.0.0.1:1: [Errno 111] Connection refused;"),
    ):
        assert main.main(["ray", "down", *address]) == 2
        error = capfd.readouterr().err
        assert f"no Ray cluster can be reached {told}" in error
        assert "start one with: ray start --head, or name another --address" in error
