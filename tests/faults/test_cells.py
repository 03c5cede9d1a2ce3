"""What is killed inside a cell, and cells that are: streams go on, and their text is the undisturbed one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.cells import TCP, cell_of, served, until
from tests.fabric import Process, fabric, processes
from tests.faults.conftest import Row
from tests.faults.readers import Readers, measured
from zfabric import AsyncClient

CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"
PACED = ("--tokens-per-second", "100", "--slots", "64")


async def test_a_worker_of_a_cell_is_killed_in_mid_stream(run_directory: Path, row: Row) -> None:
    row.fault = "worker of a cell SIGKILL in mid-stream"
    async with (
        fabric(TCP) as top,
        cell_of(top.endpoint, "east") as east,
        processes(run_directory) as children,
        AsyncClient(top.endpoint) as client,
    ):
        started = [
            Process.start(WORKER, "--endpoint", east.endpoint, "--name", name, *PACED, directory=run_directory)
            for name in ("w1", "w2")
        ]
        workers = dict(zip(("w1", "w2"), await asyncio.gather(*started), strict=True))
        children += workers.values()
        await served(east, "echo", by=2)
        await served(top, "echo")
        readers = Readers(client, 40, 120)
        await readers.have(10)
        affected = readers.served_by("w1")
        known = east.controller.broker.registry.workers
        killed_at = time.perf_counter()
        workers["w1"].kill()
        row.detection_ms = await measured(lambda: "w1" not in known, killed_at)
        await readers.finish()
        readers.check(row, affected, killed_at)
        assert len(affected) >= 10
        assert client.figures()["failovers"] == len(affected)


async def test_a_cells_controller_is_killed_and_its_streams_go_on_in_the_other_cell(
    run_directory: Path, row: Row
) -> None:
    row.fault = "controller of a cell SIGKILL, streams go on in another cell"
    async with (
        fabric(TCP) as top,
        processes(run_directory) as children,
        AsyncClient(top.endpoint) as client,
    ):
        cells: dict[str, Process] = {}
        for name in ("east", "west"):
            endpoint = f"ipc://{run_directory / name}"
            options = ("--parent", top.endpoint, "--cell", name)
            cells[name] = await Process.start(CONTROLLER, "--endpoint", endpoint, *options, directory=run_directory)
            children.append(cells[name])
            children.append(
                await Process.start(
                    WORKER, "--endpoint", endpoint, "--name", f"{name}-w", *PACED, directory=run_directory
                )
            )
        await until(lambda: len(getattr(top.controller.broker.registry.models.get("echo"), "hosts", ())) == 2, 60)
        readers = Readers(client, 40, 120)
        await readers.have(10)
        affected = readers.served_by("east-w")
        known = top.controller.broker.registry.workers
        killed_at = time.perf_counter()
        cells["east"].kill()
        row.detection_ms = await measured(lambda: "east" not in known, killed_at)
        await readers.finish()
        readers.check(row, affected, killed_at)
        assert len(affected) >= 10
        assert client.figures()["failovers"] == len(affected)
        await asyncio.gather(*[child.ended() for child in children if child is cells["east"]])
