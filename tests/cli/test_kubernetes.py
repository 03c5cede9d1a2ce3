"""The manifests of packaging/kubernetes, as far as they can be looked at without a cluster: schemas, names, commands."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import msgspec
import pytest
import yaml
from msgspec import Meta, Struct

from tests.cli.test_containers import BUILDERS, check_command
from tests.fabric import Process, processes
from zfabric import limits
from zfabric.cli.worker import WorkerSettings
from zfabric.fleet.config import load

DIRECTORY = Path(__file__).resolve().parents[2] / "packaging" / "kubernetes"
BASE, KEDA = DIRECTORY / "base", DIRECTORY / "keda"
Manifest = dict[str, Any]
#: Which module each command of a container runs.
MODULES = {name: f"zfabric.cli.{name.partition('-')[2] or 'main'}" for name in BUILDERS}


def read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def resources(directory: Path) -> list[Manifest]:
    """What a kustomization lists, in this directory."""
    [kustomization] = read(directory / "kustomization.yaml")
    files = [name for name in kustomization["resources"] if name.endswith(".yaml")]
    return [manifest for name in files for manifest in read(directory / name)]


ALL = resources(BASE)
WORKLOADS = [manifest for manifest in ALL if manifest["kind"] in ("Deployment", "StatefulSet")]


def container(workload: Manifest) -> Manifest:
    [found] = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def of_kind(kind: str) -> list[Manifest]:
    return [manifest for manifest in ALL if manifest["kind"] == kind]


@pytest.mark.parametrize("manifest", ALL, ids=lambda it: f"{it['kind']}-{it['metadata']['name']}")
def test_manifests_keep_to_the_schemas_of_kubernetes(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_a_wrong_manifest_does_not() -> None:
    wrong = {**WORKLOADS[0], "spec": {**WORKLOADS[0]["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_every_file_is_listed() -> None:
    for directory in (BASE, KEDA):
        [kustomization] = read(directory / "kustomization.yaml")
        listed = {Path(name).name for name in kustomization["resources"]}
        for generated in kustomization.get("configMapGenerator", ()):
            listed |= {*generated.get("files", ()), *generated.get("envs", ())}
        assert {path.name for path in directory.iterdir()} - {"kustomization.yaml"} == listed - {"base"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not a Python package")
def test_kubectl_renders_what_is_listed() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(KEDA)], capture_output=True, text=True, check=True)
    rendered = list(yaml.safe_load_all(done.stdout))
    expected = [*ALL, *resources(KEDA)]
    names = {(it["kind"], it["metadata"]["name"]) for it in rendered if it["kind"] != "ConfigMap"}
    assert names == {(it["kind"], it["metadata"]["name"]) for it in expected}
    [controller] = [it for it in rendered if it["kind"] == "StatefulSet"]
    [volume] = [it for it in controller["spec"]["template"]["spec"]["volumes"] if it["name"] == "fleet"]
    assert volume["configMap"]["name"] in {it["metadata"]["name"] for it in rendered if it["kind"] == "ConfigMap"}


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_selectors_find_pods_and_ports_have_names() -> None:
    labels = {
        workload["metadata"]["name"]: workload["spec"]["template"]["metadata"]["labels"] for workload in WORKLOADS
    }
    ports = {it["metadata"]["name"]: {port["name"] for port in container(it)["ports"]} for it in WORKLOADS}
    for workload in WORKLOADS:
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels[workload["metadata"]["name"]].items()
    for service in of_kind("Service"):
        [name] = [name for name, own in labels.items() if service["spec"]["selector"].items() <= own.items()]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[name]
    assert {
        budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"] for budget in of_kind("PodDisruptionBudget")
    } == labels.keys()
    for policy in of_kind("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        named = list(selector.get("matchLabels", {}).values())
        named += [name for it in selector.get("matchExpressions", ()) for name in it["values"]]
        assert set(named) <= labels.keys()
        for rule, name in itertools.product(policy["spec"].get("ingress", ()), named):
            assert {port["port"] for port in rule["ports"]} <= ports[name]


def test_nobody_is_let_in_who_is_not_named() -> None:
    closed, *opened = of_kind("NetworkPolicy")
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    without = [it["metadata"]["name"] for it in opened if not all("from" in rule for rule in it["spec"]["ingress"])]
    assert without == ["zfabric-gateway"]


def test_containers_may_do_nothing_but_run() -> None:
    for workload in WORKLOADS:
        pod, own = workload["spec"]["template"]["spec"], container(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert own["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    [worker] = [it for it in WORKLOADS if it["metadata"]["name"] == "zfabric-worker"]
    assert container(worker)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_a_drain_ends_before_the_grace_period_does() -> None:
    close_s = {"zfabric-worker": WorkerSettings().close_ms / 1_000, "zfabric-gateway": 5}
    for workload in WORKLOADS:
        name, pod = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > limits.DRAIN_MS / 1_000 + close_s.get(name, 0), name
    [gateway] = [it for it in WORKLOADS if it["metadata"]["name"] == "zfabric-gateway"]
    assert container(gateway)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(close_s["zfabric-gateway"])]


# ── scaling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Reference(Struct, forbid_unknown_fields=True, rename="camel"):
    name: str


class _Trigger(Struct, forbid_unknown_fields=True, rename="camel"):
    type: Literal["prometheus"]
    metadata: dict[str, str]
    metric_type: Literal["AverageValue", "Value"] = "AverageValue"


class _Fallback(Struct, forbid_unknown_fields=True, rename="camel"):
    failure_threshold: Annotated[int, Meta(ge=0)]
    replicas: Annotated[int, Meta(ge=0)]
    behavior: Literal["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"] = "static"


class _Spec(Struct, forbid_unknown_fields=True, rename="camel"):
    """What is used of https://keda.sh/docs/latest/reference/scaledobject-spec/, whose schema no package has."""

    scale_target_ref: _Reference
    triggers: list[_Trigger]
    min_replica_count: int
    max_replica_count: int
    polling_interval: int
    cooldown_period: int
    advanced: dict[Literal["horizontalPodAutoscalerConfig"], dict[Literal["behavior"], Any]]
    fallback: _Fallback


def test_keda_follows_the_metric_of_the_rule() -> None:
    [scaled] = resources(KEDA)
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    spec = msgspec.convert(scaled["spec"], _Spec)
    [rule] = load(BASE / "fleet.toml").rules
    assert (spec.min_replica_count, spec.max_replica_count) == (rule.min, rule.max)
    assert spec.scale_target_ref.name in {it["metadata"]["name"] for it in WORKLOADS}
    [trigger] = spec.triggers
    assert trigger.metadata["query"] == f'max(zfabric_desired_replicas{{model="{rule.model}"}})'
    assert trigger.metadata["threshold"] == "1"
    assert trigger.metadata["ignoreNullValues"] == "false"
    target = {"kind": "Deployment", "name": spec.scale_target_ref.name, "apiVersion": "apps/v1"}
    behaviour = spec.advanced["horizontalPodAutoscalerConfig"]
    autoscaler: Manifest = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "x"},
    }
    autoscaler["spec"] = {"scaleTargetRef": target, "maxReplicas": spec.max_replica_count, **behaviour}
    kubernetes_validate.validate(autoscaler, kubernetes_validate.latest_version(), strict=True)
    assert rule.model in (BASE / "worker.env").read_text()


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────


def probes(own: Manifest) -> list[list[str]]:
    """Commands of a container's exec probes, without the shell around them."""
    found = []
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = own.get(name, {}).get("exec", {}).get("command")
        if command is not None:
            found.append(command[-1].removeprefix("exec ").split() if command[0] == "sh" else command)
    return found


def test_commands_and_probes_are_what_the_parsers_take() -> None:
    commands = [container(workload)["command"] for workload in WORKLOADS]
    probed = [command for workload in WORKLOADS for command in probes(container(workload))]
    assert len(commands) == 3
    assert len(probed) == 4
    for command in commands + probed:
        check_command(*command)
    assert tomllib.loads((BASE / "fleet.toml").read_text())["workers"]


def environment(own: Manifest, pod: str) -> dict[str, str]:
    """What a container's variables are in a pod of this name."""
    found = dict(line.split("=", 1) for line in (BASE / "worker.env").read_text().split()) if "envFrom" in own else {}
    for variable in own["env"]:
        field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        assert field in (None, "metadata.name")
        found[variable["name"]] = variable["value"] if field is None else pod
    return found


def here(word: str, endpoint: str) -> str:
    """A word of a command as it is on this host: the fabric's port is a socket, other ports are free ones."""
    word = re.sub(r"tcp://[\w.-]+:9000", endpoint, word).replace("/etc/zfabric/", f"{BASE}/")
    word = re.sub(r"^(--metrics)=0\.0\.0\.0:\d+$", r"\1=127.0.0.1:0", word)
    return word.replace("=0.0.0.0", "=127.0.0.1").replace("=8000", "=0")


async def test_containers_start_are_ready_and_end_by_themselves(ipc: str, run_directory: Path) -> None:
    """As processes of this host, with a backend that needs no model."""
    by_name = {it["metadata"]["name"].removeprefix("zfabric-"): container(it) for it in WORKLOADS}
    variables: dict[str, dict[str, str]] = {}

    async def start(name: str) -> Process:
        own = by_name[name]
        command = [here(word, ipc) for word in own["command"]]
        given = {**environment(own, f"{name}-0"), "ZFABRIC_ENDPOINT": ipc}
        given |= {"ZFABRIC_WORKER_BACKEND": "echo"} if name == "worker" else {}
        given.pop("ZFABRIC_WORKER_MODEL", None)
        variables[name] = given
        made = await Process.start(MODULES[command[0]], *command[1:], directory=run_directory, prefix=(), **given)
        children.append(made)
        return made

    async def probe(name: str) -> int:
        shell = by_name[name]["readinessProbe"]["exec"]["command"]
        line = shell[-1].removeprefix("exec ") if shell[0] == "sh" else " ".join(shell)
        line = line.replace("zfabric ", f"{sys.executable} -m zfabric.cli.main ", 1)
        made = await asyncio.create_subprocess_exec("sh", "-c", line, env={**os.environ, **variables[name]})
        return await made.wait()

    async with processes(run_directory) as children:
        controller = await start("controller")
        await controller.ready()
        worker, gateway = await start("worker"), await start("gateway")
        assert "models=smollm2" in await worker.ready()
        await gateway.ready()
        assert await asyncio.gather(*map(probe, ("controller", "worker"))) == [0, 0]
        for made in (worker, gateway):
            made.kill(signal.SIGTERM)
        assert [await made.ended() for made in (worker, gateway)] == [0, 0]
        controller.kill(signal.SIGTERM)
        assert await controller.ended() == 0
