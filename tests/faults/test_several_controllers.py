"""One of three controllers is lost, its process or its host, and the streams of its clients go on by the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fabric import Process, processes
from tests.faults.conftest import Row
from tests.faults.test_namespaces import FAR, NEAR, Cable, cable

__all__ = ["cable"]

_STREAMS, _TOKENS = 500, 60


async def _worker(directory: Path, endpoints: str, name: str, prefix: tuple[str, ...] = ()) -> Process:
    options = ("--tokens-per-second", "25", "--slots", str(_STREAMS // 2))
    arguments = ("--endpoint", endpoints, "--name", name, *options)
    worker = await Process.start("zfabric.cli.worker", *arguments, directory=directory, prefix=prefix)
    await worker.ready()
    return worker


async def _client(directory: Path, endpoints: str, home: str, prefix: tuple[str, ...] = ()) -> Process:
    arguments = (endpoints, home, str(_STREAMS), str(_TOKENS))
    client = await Process.start("tests.faults.roaming", *arguments, directory=directory, prefix=prefix)
    await client.ready()
    return client


async def _told(client: Process, row: Row) -> dict[str, Any]:
    assert client.process.stdout is not None
    line = await client.process.stdout.readline()
    assert line, client.log.read_text()
    told: dict[str, Any] = json.loads(line)
    row.requests, row.lost, row.doubled = _STREAMS, told["lost"], told["doubled"]
    row.recovery_ms = told["silence_ms"]
    assert await client.ended() == 0
    assert told["lost"] == told["doubled"] == 0
    # All of them went on where they ran, without another attempt.
    assert told["moved"]
    assert told["claims"] == _STREAMS
    assert told["failovers"] == 0
    return told


async def test_one_of_three_controllers_killed(run_directory: Path, row: Row) -> None:
    row.fault = "one of three controllers SIGKILL (the longest silence of a stream)"
    endpoints = [f"ipc://{run_directory}/{number}.sock" for number in range(3)]
    async with processes(run_directory) as children:
        for endpoint in endpoints:
            children.append(
                await Process.start("zfabric.cli.controller", "--endpoint", endpoint, directory=run_directory)
            )
            await children[-1].ready()
        for name in ("w1", "w2"):
            children.append(await _worker(run_directory, ",".join(endpoints), name))
        client = await _client(run_directory, ",".join(endpoints), endpoints[0])
        children.append(client)
        children[0].kill()
        await _told(client, row)


async def test_the_cable_of_one_of_three_controllers_pulled(run_directory: Path, cable: Cable, row: Row) -> None:
    row.fault = "cable of one of three controllers pulled (the longest silence of a stream)"
    near, far = Cable.inside(cable.near), Cable.inside(cable.far)
    home = f"tcp://{FAR}:9000"
    endpoints = [home, *(f"tcp://{NEAR}:{port}" for port in (9001, 9002))]
    async with processes(run_directory) as children:
        for endpoint in endpoints:
            children.append(
                await Process.start(
                    "zfabric.cli.controller",
                    "--endpoint",
                    endpoint,
                    "--public",
                    directory=run_directory,
                    prefix=far if endpoint == home else near,
                )
            )
            await children[-1].ready()
        for name in ("w1", "w2"):
            children.append(await _worker(run_directory, ",".join(endpoints), name, near))
        client = await _client(run_directory, ",".join(endpoints), home, near)
        children.append(client)
        cable.pull()
        await _told(client, row)
