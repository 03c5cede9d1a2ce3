"""The placement group of a Ray cluster that a worker of several GPUs is in, and that its engine's executor is to use.

vLLM takes the group of the actor that it is called in. A worker is a process of its own beside its actor, so it hands the
group over by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

#: The group's name, and the namespace that it is in. What starts a worker in a group sets both.
GROUP_VARIABLE: Final = "ZFABRIC_RAY_PLACEMENT_GROUP"
NAMESPACE_VARIABLE: Final = "ZFABRIC_RAY_NAMESPACE"


def placement_group() -> Any | None:
    """The group that this process was started in, of the cluster at $RAY_ADDRESS; None if it was not."""
    name = os.environ.get(GROUP_VARIABLE)
    if not name:
        return None
    import ray

    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            namespace=os.environ.get(NAMESPACE_VARIABLE),
            log_to_driver=False,
            logging_level="ERROR",
        )
    return ray.util.get_placement_group(name)


def start_engine(arguments: Any, loggers: Sequence[Callable[..., Any]]) -> Any:
    """Start an engine, in this process's placement group where its executor runs on Ray.

    Args:
        arguments: vLLM's `AsyncEngineArgs`.
        loggers: Factories of vLLM's loggers.

    Raises:
        OSError, ValueError: vLLM refuses the model or its settings, or there is no such group.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    group = placement_group() if arguments.distributed_executor_backend == "ray" else None
    if group is None:
        return AsyncLLM.from_engine_args(arguments, stat_loggers=list(loggers))
    configuration = arguments.create_engine_config()
    configuration.parallel_config.placement_group = group
    return AsyncLLM.from_vllm_config(
        configuration,
        stat_loggers=list(loggers),
        enable_log_requests=arguments.enable_log_requests,
        disable_log_stats=arguments.disable_log_stats,
    )
