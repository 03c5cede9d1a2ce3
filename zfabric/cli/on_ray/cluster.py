"""The Ray cluster that commands connect to, and its actors by name."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final

from zfabric.errors import ConfigurationError
from zfabric.fleet.limits import RAY_ANSWER_MS, RAY_CALLS_MAX

#: The actor that has the fleet's file; processes' actors have the names of their processes.
FLEET: Final = "fleet"
CONTROLLER: Final = "controller"


def connect(address: str | None, namespace: str) -> Any:
    """Connect this process to a cluster that runs already.

    Args:
        address: HOST:PORT of its head; None for $RAY_ADDRESS, or the cluster of this host.
        namespace: Where the fleet's actors have their names.

    Returns:
        The module `ray`.

    Raises:
        ConfigurationError: Ray is not installed, or no cluster can be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError(f"Ray is not there: {error}; install it with: pip install 'zfabric[ray]'") from error
    # Nobody is told that a fleet runs here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    shown = "on this host" if where == "auto" else f"at {where}"
    try:
        _call(where)
        ray.init(address=where, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"no Ray cluster can be reached {shown}: {(str(error).splitlines() or ['no answer'])[0].rstrip('.')}; "
            "start one with: ray start --head, or name another --address",
            address=where,
        ) from error
    return ray


def _call(address: str) -> None:
    """See whether somebody listens at HOST:PORT: Ray itself would try again for minutes. Raises: OSError: Nobody does."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), RAY_ANSWER_MS / 1_000).close()


async def found(name: str, namespace: str) -> Any | None:
    """An actor by its name; None if there is none."""
    import ray

    try:
        return await asyncio.to_thread(ray.get_actor, name, namespace=namespace)
    except ValueError:
        return None


async def names(namespace: str) -> list[str]:
    """Those of all actors of a namespace that have one."""
    import ray

    rows = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
    return sorted(row["name"] for row in rows if row["namespace"] == namespace)


def make(kind: type, name: str, namespace: str, *given: Any, **options: Any) -> Any:
    """Start an actor that Ray starts again for as long as it is wanted, whoever started it.

    Raises:
        ValueError: There is one of that name.
    """
    import ray

    actor = ray.remote(kind).options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=RAY_CALLS_MAX,
        **options,
    )
    return actor.remote(*given)
