"""A fleet's file as commands that say what each needs of a Ray cluster."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

from zfabric.cli.children import Command
from zfabric.cli.fleet import Plan
from zfabric.errors import ConfigurationError
from zfabric.fleet.config import Fleet, Group
from zfabric.fleet.needs import Needs, Strategy
from zfabric.transport.endpoints import parse_endpoints
from zfabric.version import __version__

#: What vLLM multiplies to the number of its GPUs: settings, and what their flags may be called.
_PARALLEL: Final = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp"),
}
_EXECUTOR: Final = "--distributed-executor-backend"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What one process needs.

    Attributes:
        num_cpus, num_gpus, resources: Of the process's own actor.
        bundles: The placement group that the actor is in, in the first of them; none for no group.
        strategy: How the bundles lie on nodes.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    bundles: tuple[Mapping[str, float], ...] = ()
    strategy: Strategy = "PACK"

    @property
    def parts(self) -> list[dict[str, float]]:
        """All that has to be free, a dictionary for what has to be on one node."""
        if self.bundles:
            return [dict(bundle) for bundle in self.bundles]
        own = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return [{name: amount for name, amount in own.items() if amount}]


@dataclass(frozen=True, kw_only=True)
class Placed(Command):
    """A command that says what it needs.

    Attributes:
        placement: That.
        version: Of zfabric, so that another one is reason enough for a restart.
    """

    placement: Placement = field(default_factory=Placement)
    version: str = __version__


class RayPlan(Plan):
    """A fleet's processes as commands for nodes of a Ray cluster.

    Where the fleet has a controller, no command has its endpoint: it is known when the controller is on its node.

    Args:
        fleet: What its file says.
        directory: Where relative paths of the file begin, on all nodes.
    """

    def __init__(self, fleet: Fleet, directory: Path) -> None:
        super().__init__(fleet, Path(fleet.ray.directory or directory), finding=fleet.controller is not None)

    def controller(self) -> Placed | None:
        command = super().controller()
        return None if command is None else _placed(command, _alone(self.fleet.ray.controller))

    def gateway(self) -> Placed | None:
        command = super().gateway()
        return None if command is None else _placed(command, _alone(self.fleet.ray.gateway))

    def worker(self, name: str, number: int) -> Placed:
        group = self.fleet.workers[name]
        # Ray says which devices it may see.
        command = dataclasses.replace(super().worker(name, number), environment=dict(group.environment))
        if _has_executor(group):
            arguments = (*command.arguments, *([] if _says_executor(group) else [_EXECUTOR, "ray"]))
            command = dataclasses.replace(command, arguments=arguments)
        return _placed(command, _of_worker(group))

    def check(self) -> None:
        """As of every plan; also what one host does not ask about.

        Raises:
            ConfigurationError: The message names the table and the key.
        """
        fleet = self.fleet
        if fleet.controller is not None:
            if fleet.fleet.endpoint is not None:
                _refuse("fleet.endpoint", "Ray says on which node the controller is; [ray] port says at which port")
            if fleet.controller.get("public") is not True and fleet.fleet.config is None:
                _refuse("controller.public", "other nodes have to reach the controller: it must be true")
        elif any(endpoint.is_ipc for endpoint in parse_endpoints(self.endpoint)):
            _refuse("fleet.endpoint", "without [controller] it must be a tcp endpoint, which all nodes can reach")
        for name, group in fleet.workers.items():
            _check_group(f"workers.{name}", group)
        super().check()


def _check_group(table: str, group: Group) -> None:
    needs, parallel = group.ray, _parallel(group)
    if group.devices and not (needs.num_gpus or needs.bundles):
        _refuse(f"{table}.devices", "Ray says which GPUs a worker may see; ray.num_gpus says how many")
    if needs.num_gpus > 1 and needs.num_gpus != math.floor(needs.num_gpus):
        _refuse(f"{table}.ray.num_gpus", f"{needs.num_gpus:g} is neither a whole number nor below 1")
    if needs.bundles:
        if needs.num_gpus:
            _refuse(f"{table}.ray.num_gpus", "bundles say what there is")
        if any(not any(bundle.values()) for bundle in needs.bundles):
            _refuse(f"{table}.ray.bundles", "a bundle has at least one resource")
        first = needs.bundles[0]
        for name, amount in {"CPU": needs.num_cpus, **needs.resources}.items():
            if first.get(name, 0.0) < amount:
                _refuse(
                    f"{table}.ray.bundles", f"the first has {name} {first.get(name, 0):g}, its process needs {amount:g}"
                )
    if group.settings.get("backend") == "vllm" and parallel > 1:
        gpus = sum(bundle.get("GPU", 0) for bundle in needs.bundles) if needs.bundles else needs.num_gpus
        if gpus < parallel:
            _refuse(f"{table}.ray", f"vLLM is to run on {parallel} GPUs, and {gpus:g} are asked for")


def _has_executor(group: Group) -> bool:
    """Whether vLLM runs on several GPUs by its executor on Ray."""
    several = group.settings.get("backend") == "vllm" and (group.ray.num_gpus > 1 or len(group.ray.bundles) > 1)
    return several and _executor(group) in (None, "ray")


def _says_executor(group: Group) -> bool:
    return _executor(group) is not None


def _executor(group: Group) -> str | None:
    """What the file says of vLLM's executor."""
    said = group.settings.get("distributed_executor_backend")
    return said or _flag(group.arguments, (_EXECUTOR,))


def _parallel(group: Group) -> int:
    """On how many GPUs vLLM is told to run; what it will not understand either is left to it."""
    product = 1
    for key, flags in _PARALLEL.items():
        said = _flag(group.arguments, flags) or group.settings.get(key, 1)
        product *= int(said) if str(said).isdecimal() else 1
    return product


def _flag(arguments: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    found = None
    for one, after in pairwise((*arguments, "")):
        name, separator, value = one.partition("=")
        if name in names:
            found = value if separator else after
    return found


def _of_worker(group: Group) -> Placement:
    needs = group.ray
    if needs.bundles:
        return Placement(
            num_cpus=needs.num_cpus, resources=needs.resources, bundles=needs.bundles, strategy=needs.strategy
        )
    if not _has_executor(group):
        return _alone(needs)
    # The process itself computes nothing on a GPU: vLLM's own actors do, one in each bundle.
    own = {"CPU": needs.num_cpus, **needs.resources}
    first = {"GPU": 1.0, **{name: amount for name, amount in own.items() if amount}}
    bundles = (first, *({"GPU": 1.0} for _ in range(int(needs.num_gpus) - 1)))
    return Placement(num_cpus=needs.num_cpus, resources=needs.resources, bundles=bundles, strategy=needs.strategy)


def _alone(needs: Needs) -> Placement:
    return Placement(num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, resources=needs.resources)


def _placed(command: Command, placement: Placement) -> Placed:
    fields: dict[str, Any] = {one.name: getattr(command, one.name) for one in dataclasses.fields(Command)}
    return Placed(**fields, placement=placement)


def _refuse(key: str, why: str) -> NoReturn:
    raise ConfigurationError(f"{key}: {why}", key=key)


def shown(parts: list[dict[str, float]]) -> str:
    """Resources in words, as "CPU 1, GPU 1 and 3 times GPU 1"."""
    told: list[str] = []
    for part in parts:
        told.append(", ".join(f"{name} {amount:g}" for name, amount in part.items()) or "nothing")
    counted = {text: told.count(text) for text in told}
    return " and ".join(text if count == 1 else f"{count} times {text}" for text, count in counted.items())


def lacking(placement: Placement, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """Why a process may wait for a node.

    Args:
        placement: What it needs.
        nodes: All resources of each node that is there.
        free: What nobody has taken, of all nodes together.

    Returns:
        A sentence without a stop, such as "it waits for GPU 4, and no node has that".
    """
    parts, packed = placement.parts, placement.strategy == "STRICT_PACK"
    if packed and len(parts) > 1:
        parts = [_sum(parts)]
    waits = f"it waits for {shown(parts)}"
    for part in parts:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in part.items()) for node in nodes):
            return f"{waits}, and no node has {shown([part])}"
    if placement.strategy == "STRICT_SPREAD" and len(parts) > len(nodes):
        there_are = "there is 1 node" if len(nodes) == 1 else f"there are {len(nodes)} nodes"
        return f"{waits}, each on a node of its own, and {there_are}"
    wanted, there = _sum(parts), _sum(nodes)
    if not wanted:
        return f"{waits}, and there is room for it"
    for name, amount in wanted.items():
        if there.get(name, 0.0) < amount:
            return f"{waits}, and all nodes together have {name} {there.get(name, 0.0):g}"
    left = ", ".join(f"{name} {free.get(name, 0.0):g} of {there[name]:g}" for name in wanted)
    return f"{waits}; free is {left}"


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total
