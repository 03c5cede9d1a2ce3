"""Processes that die, freeze and come back, with the default timings: beat 1 s, lease 3 s."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import zmq

from tests.fabric import Process, at_rest, fabric, processes
from tests.faults.conftest import Row
from tests.faults.readers import Readers, measured
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.core.worker.session import WorkerSession
from zfabric.transport.context import make_context
from zfabric.transport.options import set_dealer_options
from zfabric.wire import kinds
from zfabric.wire.load import Load
from zfabric.wire.messages import ModelInfo

CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"


async def start_worker(directory: Path, endpoint: str, name: str, *options: str) -> Process:
    process = await Process.start(WORKER, "--endpoint", endpoint, "--name", name, *options, directory=directory)
    await process.ready()
    return process


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("moment", ["before the first token", "in mid-stream"])
async def test_worker_killed(ipc: str, run_directory: Path, row: Row, moment: str) -> None:
    early = moment == "before the first token"
    row.fault = f"worker SIGKILL {moment}"
    async with fabric(ipc) as made, processes(run_directory) as children, AsyncClient(ipc) as client:
        options = ["--tokens-per-second", "100", *(["--first-token-ms", "400"] if early else [])]
        workers = {name: await start_worker(run_directory, ipc, name, *options) for name in ("w1", "w2")}
        children += workers.values()
        readers = Readers(client, 40, 150)
        known = made.controller.broker.registry.workers
        if early:
            while sum(worker.in_flight for worker in known.values()) < 40:
                await asyncio.sleep(0.005)
            affected = list(range(40))
        else:
            await readers.have(10)
            affected = readers.served_by("w1")
        count = known["w1"].in_flight
        killed_at = time.perf_counter()
        workers["w1"].kill()
        row.detection_ms = await measured(lambda: "w1" not in known, killed_at)
        await readers.finish()
        readers.check(row, affected, killed_at)
        row.requests = count
        assert count >= 10
        assert client.figures()["failovers"] == count


async def test_worker_frozen(ipc: str, run_directory: Path, row: Row) -> None:
    row.fault = "worker SIGSTOP, SIGCONT after its lease"
    async with fabric(ipc) as made, processes(run_directory) as children, AsyncClient(ipc) as client:
        options = ("--tokens-per-second", "50")
        workers = {name: await start_worker(run_directory, ipc, name, *options) for name in ("w1", "w2")}
        children += workers.values()
        readers = Readers(client, 20, 300)
        await readers.have(10)
        affected = readers.served_by("w1")
        known = made.controller.broker.registry.workers
        frozen_at = time.perf_counter()
        workers["w1"].kill(signal.SIGSTOP)
        row.detection_ms = await measured(lambda: "w1" not in known, frozen_at)
        await asyncio.sleep(0.5)
        workers["w1"].kill(signal.SIGCONT)
        await readers.finish()
        readers.check(row, affected, frozen_at)
        await measured(lambda: "w1" in known, frozen_at)
        again = Readers(client, 10, 20, first=100)
        await again.finish()
        assert {stream.worker for stream in again.streams} == {"w1", "w2"}


async def test_engine_hangs(ipc: str, row: Row) -> None:
    row.fault = "engine hangs, its process beats on (stall 1 s)"

    class Hanging(EchoWorker):
        """Stops stepping when told to, but its event loop goes on."""

        hangs = False

        def _step(self, now: float, interval: float) -> None:
            if not self.hangs:
                super()._step(now, interval)

    async with fabric(ipc, beat_ms=200, lease_ms=600, stall_ms=1_000) as made, AsyncClient(ipc) as client:
        options = EchoOptions(tokens_per_second=100)
        engine = Hanging(options)
        await made.add_worker("w1", engine)
        readers = Readers(client, 10, 60)
        await readers.have(15)
        engine.hangs = True
        hung_at = time.perf_counter()
        await made.add_worker("w2", EchoWorker(options))
        await readers.finish()
        readers.check(row, list(range(10)), hung_at)
        assert {stream.worker for stream in readers.streams} == {"w2"}


async def test_controller_killed(ipc: str, run_directory: Path, row: Row) -> None:
    row.fault = "controller SIGKILL, back after 2 s"
    async with processes(run_directory) as children, AsyncClient(ipc) as client:
        first = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(first)
        await first.ready()
        for name in ("w1", "w2"):
            children.append(await start_worker(run_directory, ipc, name, "--tokens-per-second", "40"))
        readers = Readers(client, 100, 300)
        await readers.have(10)
        killed_at = time.perf_counter()
        first.kill()
        await asyncio.sleep(2)
        second = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(second)
        await second.ready()
        await readers.finish()
        readers.check(row, list(range(100)), killed_at)
        figures = client.figures()
        assert figures["failovers"] == figures["gaps"] == 0
        assert (await client.status()).recovered == 100


async def test_clients_killed(ipc: str, run_directory: Path, row: Row) -> None:
    row.fault = "client SIGKILL"
    async with fabric(ipc) as made, processes(run_directory) as children:
        service = await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=50)))
        worker = made.controller.broker.registry.workers["w0"]
        detection: list[float] = []
        for _ in range(5):
            child = await Process.start(
                "zfabric.cli.main", "generate", "echo", "a", "--max-new-tokens", "100000", "--endpoint", ipc,
                directory=run_directory,
            )  # fmt: skip
            children.append(child)
            await measured(lambda: bool(worker.live), time.perf_counter())
            killed_at = time.perf_counter()
            child.kill()
            detection.append(await measured(lambda: not service._sessions.streams, killed_at))
            await at_rest(made.controller)
        row.injected = row.requests = 5
        row.detection_ms = max(detection)
        assert not made.controller.broker.registry.clients


async def test_rolling_restart(ipc: str, run_directory: Path, row: Row) -> None:
    row.fault = "rolling restart of all workers under load"
    async with fabric(ipc) as made, processes(run_directory) as children, AsyncClient(ipc) as client:
        options = ("--tokens-per-second", "60", "--drain-ms", "100")
        workers = {f"w{n}": await start_worker(run_directory, ipc, f"w{n}", *options) for n in range(3)}
        children += workers.values()
        readers = Readers(client, 60, 240)
        await readers.have(5)
        began_at = time.perf_counter()
        for name, worker in workers.items():
            worker.kill(signal.SIGTERM)
            assert await worker.ended() == 0
            children.append(await start_worker(run_directory, ipc, f"{name}-new", *options))
        await readers.finish()
        readers.check(row, list(range(60)), began_at)
        row.injected = 3
        row.recovery_ms = None
        assert client.figures()["failovers"] > 0, "streams were moved, not waited for"
        assert set(made.controller.broker.registry.workers) == {"w0-new", "w1-new", "w2-new"}


@pytest.mark.parametrize("order", ["cwk", "ckw", "wck", "wkc", "kcw", "kwc"])
async def test_every_order_of_starting(ipc: str, run_directory: Path, row: Row, order: str) -> None:
    """c: controller, w: worker, k: client."""
    row.fault = f"started in the order {' '.join({'c': 'controller', 'w': 'worker', 'k': 'client'}[o] for o in order)}"
    async with processes(run_directory) as children, AsyncClient(ipc, connect_timeout_ms=30_000) as client:
        answer: asyncio.Task[str] | None = None

        async def ask() -> str:
            return (await client.generate("echo", "in any order", max_new_tokens=3)).text

        for part in order:
            if part == "k":
                answer = asyncio.create_task(ask())
            else:
                module = CONTROLLER if part == "c" else WORKER
                children.append(await Process.start(module, "--endpoint", ipc, directory=run_directory))
            await asyncio.sleep(0.3)
        assert answer is not None
        assert await answer == "in any order "
        row.requests = 1


async def said(socket: zmq.Socket[bytes], message: bytes) -> None:
    """Send when there is a connection, which the controller on this very loop has to take first."""
    while True:
        try:
            socket.send(message, zmq.DONTWAIT)
        except zmq.Again:
            await asyncio.sleep(0.001)
        else:
            return


async def test_a_storm_of_workers(ipc: str, row: Row) -> None:
    """1,000 workers register at the same moment, and again after a restart, while a stream runs."""
    row.fault = "1,000 workers register at once"
    async with fabric(ipc) as made, AsyncClient(ipc) as client:
        await made.add_worker("real", EchoWorker(EchoOptions(tokens_per_second=100)))
        readers = Readers(client, 5, 300)
        await readers.have(5)
        context = make_context()
        sockets = []
        rng = random.Random(1)
        for _ in range(1_000):
            socket = context.socket(zmq.DEALER)
            set_dealer_options(socket, None)
            socket.connect(ipc)
            sockets.append(socket)
        began_at = time.perf_counter()
        for number, socket in enumerate(sockets):
            session = WorkerSession(name=f"n{number}", instance=number, rng=rng)
            session.load = Load(slots=1)
            session.announce([ModelInfo(name=f"m{number % 10}", capabilities=["generate"])], 0)
            session.connected(0)
            await said(socket, session.outbox[0][0])
        known = made.controller.broker.registry.workers
        row.recovery_ms = await measured(lambda: len(known) == 1_001, began_at)
        welcomes = 0
        for socket in sockets:
            while not socket.poll(0):
                await asyncio.sleep(0.001)
            welcomes += socket.recv_multipart()[0][0] == kinds.WELCOME
        assert welcomes == 1_000
        for socket in sockets:
            socket.close()
        context.term()
        row.detection_ms = await measured(lambda: len(known) == 1, time.perf_counter())
        await readers.finish()
        row.requests = 5
        assert all(len(stream.text) > 0 and stream.worker == "real" for stream in readers.streams)


async def test_nothing_is_left_of_a_thousand_lives(ipc: str, run_directory: Path, row: Row) -> None:
    """Requests that end in every way, again and again: the controller's memory and files come back to where they were."""
    row.fault = "2,000 requests cancelled, expired, refused or done"
    async with processes(run_directory) as children, AsyncClient(ipc) as client:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, "--recovery-ms", "0", directory=run_directory)
        children.append(controller)
        await controller.ready()
        children.append(await start_worker(run_directory, ipc, "w1", "--tokens-per-second", "1000", "--slots", "16"))
        process = psutil.Process(controller.process.pid)

        async def round_of(count: int) -> None:
            async def one(number: int) -> None:
                kind = number % 4
                deadline = 20 if kind == 1 else None
                model = "nope" if kind == 2 else "echo"
                task = asyncio.create_task(
                    client.generate(model, "a b", max_new_tokens=5_000 if kind in (0, 1) else 5, deadline_ms=deadline)
                )
                await asyncio.sleep(0.005)
                if kind == 0:
                    task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            await asyncio.gather(*(one(number) for number in range(count)))

        await round_of(1_000)
        await asyncio.sleep(0.3)
        memory, files = process.memory_info().rss, process.num_fds()
        for _ in range(2):
            await round_of(500)
        await asyncio.sleep(0.3)
        status = await client.status()
        assert (status.in_flight, status.queued, status.queued_bytes) == (0, 0, 0)
        assert process.memory_info().rss - memory < 8 * 2**20
        assert process.num_fds() <= files
        row.requests = 2_000
