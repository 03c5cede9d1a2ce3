"""What a fleet's processes need on a Ray cluster. `zfabric up`, which has one host, passes over it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Amount = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
_Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]


class Needs(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A table [ray.controller] or [ray.gateway]: where Ray may put the process.

    Attributes:
        num_cpus: CPUs that Ray reserves for the process.
        num_gpus: GPUs that Ray reserves for the process, which sees no others; shares such as 0.5 are below 1.
        resources: Other resources of a node by name, such as those that were given to `ray start --resources`.
    """

    num_cpus: Amount = 1.0
    num_gpus: Amount = 0.0
    resources: dict[str, Amount] = {}


class WorkerNeeds(Needs, frozen=True, kw_only=True):
    """A table [workers.NAME.ray]: where Ray may put each worker of the group.

    Attributes:
        num_cpus: CPUs that Ray reserves for each worker.
        num_gpus: GPUs that Ray reserves for each worker; for vLLM with several, a bundle of a placement group each.
        resources: Other resources of a node by name.
        bundles: The placement group of each worker, whose process is in the first bundle; by default one bundle for each GPU
            where vLLM runs on several.
        strategy: How the bundles lie on nodes.
    """

    bundles: tuple[dict[str, Amount], ...] = ()
    strategy: Strategy = "PACK"


class OnRay(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The table [ray]: what holds on a Ray cluster.

    Attributes:
        port: The controller's, on whichever node it is; 0 is a free one.
        directory: Where the processes run on their nodes, and where relative paths begin; by default the file's own directory,
            which has to be on every node then.
        controller: What the controller needs.
        gateway: What the gateway needs.
    """

    port: _Port = 0
    directory: str | None = None
    controller: Needs = Needs()
    gateway: Needs = Needs()
