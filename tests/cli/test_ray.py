"""zfabric ray: a fleet's file on a Ray cluster, and its processes while nodes die and the file changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any


from tests.ray_cluster import HEAD, RayCluster, ray_cluster
from zfabric import AsyncClient

PROMPT = "one two three four"
FLEET = """
[controller]
public = true
recovery_ms = 0

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
#: The head has room for nothing but the actor of the file, as in clusters whose head is spared.
NODES = ('{"num_cpus": 0}', *['{"num_cpus": 4, "resources": {"worker": 2}}'] * 2)


async def rows(cluster: RayCluster) -> dict[str, dict[str, Any]]:
    """What `zfabric ray status` shows, by name."""
    code, output, errors = await cluster.zfabric("status", "--json")
    assert code == 0, errors
    return {row["name"]: row for row in json.loads(output)}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until something holds."""
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.05)


async def test_nodes_die_under_load_and_the_fleet_goes_on(run_directory: Path) -> None:
    """A worker's node first, then the controller's; each stream goes on, and the file's next text changes what runs."""
    file, endpoint = run_directory / "fleet.toml", run_directory / "endpoint"
    file.write_text(FLEET)
    async with ray_cluster(*NODES) as cluster:
        code, output, errors = await cluster.zfabric("up", str(file), "--timeout", "60")
        assert code == 0, errors
        assert output.startswith("ready endpoint=tcp://127.0.0.")
        assert "url=http://127.0.0.1:" in output
        assert output.endswith("processes=4\n")
        following = await cluster.start("endpoint", "--follow", str(endpoint))
        before = await rows(cluster)
        assert {row["state"] for row in before.values()} == {"ready"}
        assert HEAD not in {row["node"] for row in before.values()}
        controllers = before["controller"]["node"]
        (other,) = {"127.0.0.3", "127.0.0.4"} - {controllers}
        print(before)
        async with AsyncClient(f"file://{endpoint}") as client:
            await streams_survive(client, cluster, other)
        following.terminate()
        await following.communicate()
        print(await cluster.zfabric("down"))


async def streams_survive(client: AsyncClient, cluster: RayCluster, node: str) -> None:
    """Kill a node while streams run; each of them ends with what it would have said."""
    answers = [asyncio.create_task(client.generate("echo", PROMPT, max_new_tokens=160)) for _ in range(16)]

    async def all_run() -> bool:
        return (await client.status()).in_flight == len(answers)

    await until(all_run)
    await cluster.kill(node)
    assert [(await answer).text for answer in answers] == [f"{PROMPT} " * 40] * len(answers)
