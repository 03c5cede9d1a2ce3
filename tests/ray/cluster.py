"""A Ray cluster of several raylets on this host, as a process of its own that ends with whoever started it.

Each node has a loopback address of its own. A line `kill ADDRESS` on standard input kills a node with all that runs there, at
once and without a word, as when a host loses its power.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import psutil

ROOT: Final = Path(__file__).resolve().parents[2]
HEAD: Final = "127.0.0.2"
#: A node that has room for a whole fleet of two workers.
WORKERS: Final = '{"num_cpus": 4, "resources": {"worker": 2}}'
FLEET: Final = """
[controller]
public = true

[gateway]
port = 0

[workers.echo]
replicas = 2

[workers.echo.settings]
backend = "echo"
slots = 64
tokens_per_second = 40

[workers.echo.ray]
resources = { worker = 1 }
"""
#: Nobody is told of tests; keys of a cluster would be written to the user's own directory; compiled modules are used.
ENVIRONMENT: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
#: A node that is gone is missed within a second or two, instead of half a minute.
_SYSTEM: Final = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1_000,
}
_STORE_BYTES: Final = 80_000_000


class RayCluster:
    """A running cluster.

    Attributes:
        address: That `zfabric ray --address` takes.
    """

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    async def kill(self, node: str) -> None:
        """Kill a node by its address, and all that runs there. Returns when nothing of it is left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"kill {node}\n".encode())
        assert (await self._process.stdout.readline()).strip() == b"killed"

    async def zfabric(self, *arguments: str) -> tuple[int, str, str]:
        """Run `zfabric ray`. Returns its exit code, output and errors."""
        process = await self.start(*arguments)
        output, errors = await process.communicate()
        return process.returncode or 0, output.decode(), errors.decode()

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start `zfabric ray`."""
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "zfabric.cli.main", "ray", *arguments, "--address", self.address,
            cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip


def environment() -> dict[str, str]:
    """Of all processes of a cluster. Without compiled modules each of its many processes would compile them."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}, **ENVIRONMENT}


@contextlib.asynccontextmanager
async def ray_cluster(*nodes: str) -> AsyncIterator[RayCluster]:
    """A cluster. Args: nodes: Resources of each node as JSON, the head's first."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.ray.cluster", *nodes,
        cwd=ROOT, env=environment(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        word, _, address = (await process.stdout.readline()).decode().strip().partition(" ")
        assert word == "ready"
        yield RayCluster(process, address)
    finally:
        process.stdin.close()
        await process.wait()


async def rows(cluster: RayCluster) -> dict[str, dict[str, Any]]:
    """What `zfabric ray status` shows, by name."""
    code, output, errors = await cluster.zfabric("status", "--json")
    assert code == 0, errors
    return {row["name"]: row for row in json.loads(output)}


@contextlib.asynccontextmanager
async def followed(cluster: RayCluster, file: Path) -> AsyncIterator[str]:
    """The endpoint of a file that is kept up to date."""
    process = await cluster.start("endpoint", "--follow", str(file))
    try:
        yield f"file://{file}"
    finally:
        process.terminate()
        await process.communicate()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until something holds."""
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


def main(nodes: list[str]) -> None:
    """Run a cluster until the end of standard input."""
    with tempfile.TemporaryDirectory(prefix="zf-ray-", ignore_cleanup_errors=True) as home:
        # What dies without a word leaves its files there.
        os.environ["TMPDIR"] = home
        _run([json.loads(node) for node in nodes])


def _run(nodes: list[dict[str, Any]]) -> None:
    from ray._private.node import Node
    from ray.cluster_utils import Cluster

    # Nobody looks at a dashboard, at jobs or at logs, and an autoscaler has nothing to scale: fewer processes to start.
    Node.start_api_server = Node.start_monitor = lambda *_, **__: None
    options: dict[str, Any] = {"include_log_monitor": False, "object_store_memory": _STORE_BYTES}
    head, *others = nodes
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **options, **head, "include_dashboard": False, "node_ip_address": HEAD, "_system_config": _SYSTEM,
        },
    )  # fmt: skip
    started = {HEAD: cluster.head_node}
    for number, node in enumerate(others, start=3):
        address = f"127.0.0.{number}"
        started[address] = cluster.add_node(wait=False, node_ip_address=address, **options, **node)
    cluster.wait_for_nodes()
    print("ready", cluster.address, flush=True)
    for line in sys.stdin:
        _kill(started[line.split()[1]].all_processes["raylet"][0].process.pid)
        print("killed", flush=True)
    cluster.shutdown()


def _kill(raylet: int) -> None:
    found = psutil.Process(raylet)
    doomed = [found, *found.children(recursive=True)]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(doomed, timeout=20)


if __name__ == "__main__":
    main(sys.argv[1:])
