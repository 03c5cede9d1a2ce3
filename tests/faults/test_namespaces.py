"""A partition as a network makes it: controller and worker in network namespaces of their own, the cable between pulled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fabric import Process, processes
from tests.faults.conftest import Row
from tests.faults.readers import Readers
from zfabric import AsyncClient

#: Addresses for documentation (RFC 5737): nobody's, and only inside the namespaces.
NEAR, FAR = "192.0.2.1", "192.0.2.2"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Cable:
    """Two namespaces and what joins them."""

    near: str
    far: str

    def pull(self) -> None:
        """Nothing passes, and nobody is told: neither side gets a reset."""
        _ip("-n", self.far, "link", "set", "cable", "down")

    def plug(self) -> None:
        """As before."""
        _ip("-n", self.far, "link", "set", "cable", "up")

    @staticmethod
    def inside(namespace: str) -> tuple[str, ...]:
        """Command prefix that runs the rest in a namespace."""
        return ("ip", "netns", "exec", namespace)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Skips where the system gives no namespaces: elsewhere than on Linux, or without the right."""
    made = Cable(f"zf-near-{os.getpid()}", f"zf-far-{os.getpid()}")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    with contextlib.ExitStack() as stack:
        for name in (made.near, made.far):
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made: {error.stderr.decode().strip()}")
            stack.callback(_ip, "netns", "del", name)
        _ip("-n", made.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", made.far)
        for name, address in ((made.near, NEAR), (made.far, FAR)):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield made


async def test_a_pulled_cable(run_directory: Path, cable: Cable, row: Row) -> None:
    """The far worker's streams go on at the near one, and the far one is back when the cable is."""
    row.fault = "cable between network namespaces pulled for 5 s"
    ipc, tcp = f"ipc://{run_directory}/c.sock", f"tcp://{NEAR}:9000"
    async with processes(run_directory) as children:
        children.append(
            await Process.start(
                "zfabric.cli.controller",
                "--endpoint",
                ipc,
                "--endpoint",
                tcp,
                "--public",
                "--recovery-ms",
                "0",
                directory=run_directory,
                prefix=cable.inside(cable.near),
            )
        )
        await children[0].ready()
        for name, endpoint, prefix in (("near", ipc, ()), ("far", tcp, cable.inside(cable.far))):
            worker = await Process.start(
                "zfabric.cli.worker",
                "--endpoint",
                endpoint,
                "--name",
                name,
                "--tokens-per-second",
                "50",
                directory=run_directory,
                prefix=prefix,
            )
            children.append(worker)
            await worker.ready()
        async with AsyncClient(ipc) as client, AsyncClient(ipc) as observer:
            readers = Readers(client, 20, 350)
            await readers.have(10)
            affected = readers.served_by("far")
            assert len(affected) >= 5
            cut_at = time.perf_counter()
            cable.pull()
            row.detection_ms = await _until_workers(observer, {"near"}, cut_at)
            await asyncio.sleep(max(0.0, 5 - (time.perf_counter() - cut_at)))
            cable.plug()
            await _until_workers(observer, {"near", "far"}, cut_at)
            await readers.finish()
            readers.check(row, affected, cut_at)


async def _until_workers(client: AsyncClient, names: set[str], since: float) -> float:
    """Wait until exactly these workers are registered. Returns milliseconds since a time."""
    async with asyncio.timeout(30):
        while {worker.name for worker in await client.workers()} != names:
            await asyncio.sleep(0.01)
    return (time.perf_counter() - since) * 1_000
