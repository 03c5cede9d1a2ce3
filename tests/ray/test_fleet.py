"""A fleet on a Ray cluster of several raylets, one of which dies under load."""

from __future__ import annotations

from pathlib import Path

from tests.ray.cluster import FLEET, WORKERS, followed, ray_cluster, until
from tests.ray.load import Load
from zfabric import AsyncClient


async def test_the_controllers_node_dies_under_load_and_each_stream_goes_on(run_directory: Path) -> None:
    """With it dies one of the two workers. Ray starts all anew on the other node, where workers and clients find it."""
    file, held = run_directory / "fleet.toml", run_directory / "endpoint"
    file.write_text(FLEET)
    # The head has room for nothing but the actor of the file, as in clusters whose head is spared.
    async with ray_cluster('{"num_cpus": 0}', WORKERS, WORKERS) as cluster:
        code, output, errors = await cluster.zfabric("up", str(file), "--timeout", "60")
        assert code == 0, errors
        told = dict(word.partition("=")[::2] for word in output.split()[1:])
        assert told.keys() == {"endpoint", "url", "processes"}
        assert told["processes"] == "4"
        nodes = {"127.0.0.3", "127.0.0.4"}
        (doomed,) = {node for node in nodes if told["endpoint"].startswith(f"tcp://{node}:")}
        async with followed(cluster, held) as endpoint, AsyncClient(endpoint) as client:
            load = await Load.begin(client, 16)
            await cluster.kill(doomed)
            await load.end()
            assert held.read_text().startswith(f"tcp://{(nodes - {doomed}).pop()}:")

            async def both_are_back() -> bool:
                return {row.name for row in await client.workers()} == {"echo-1", "echo-2"}

            await until(both_are_back)
        code, _, errors = await cluster.zfabric("down")
        ended = {f"{name}: ended" for name in ("controller", "gateway", "echo-1", "echo-2")}
        assert (code, set(errors.splitlines())) == (0, ended)
