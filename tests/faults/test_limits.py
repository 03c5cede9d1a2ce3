"""Partitions, full pipes, exhausted files, deadlines in every state, and clocks that jump."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.fabric import Process, at_rest, fabric, processes, words
from tests.faults.conftest import Row
from tests.faults.readers import Readers, measured
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import DeadlineExceededError
from zfabric.limits import WINDOW_UNITS
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

ROOT = Path(__file__).resolve().parents[2]


class Wire:
    """A TCP path that can be cut without a word to either end: bytes just stop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await self._server.wait_closed()

    def cut(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, other_writer]
        for source, target in ((reader, other_writer), (other_reader, writer)):
            task = asyncio.create_task(self._carry(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                await self._open.wait()
                target.write(data)
                await target.drain()
        target.close()


async def test_a_partition_that_heals(row: Row) -> None:
    """A worker's path goes dead without a word; its streams move, and it comes back when the path does."""
    row.fault = "silent partition of a worker, healed after 5 s"
    async with fabric("tcp://127.0.0.1:*") as made:
        port = int(made.endpoint.rpartition(":")[2])
        async with Wire(port) as wire, AsyncClient(made.endpoint) as client:
            options = EchoOptions(tokens_per_second=50)
            await made.add_worker("near", EchoWorker(options))
            ready = asyncio.Event()
            far = WorkerService(
                [EchoWorker(options)], WorkerConfig(endpoint=wire.endpoint, name="far"), on_ready=lambda _: ready.set()
            )
            task = asyncio.create_task(far.run())
            await ready.wait()
            readers = Readers(client, 20, 350)
            await readers.have(10)
            affected = readers.served_by("far")
            assert len(affected) >= 5
            known = made.controller.broker.registry.workers
            cut_at = time.perf_counter()
            wire.cut()
            row.detection_ms = await measured(lambda: "far" not in known, cut_at)
            await asyncio.sleep(max(0.0, 5 - (time.perf_counter() - cut_at)))
            wire.heal()
            await measured(lambda: "far" in known, cut_at)
            await readers.finish()
            readers.check(row, affected, cut_at)
            await measured(lambda: not far._sessions.streams, time.perf_counter())
            await far.drain()
            await task


async def test_one_reader_stops_and_ninety_nine_read(ipc: str, row: Row) -> None:
    """What is kept for the one stays within its window; the figure says what the others noticed."""

    async def read(client: AsyncClient, count: int) -> float:
        began_at = time.perf_counter()
        prompts = [f"r{number}" for number in range(count)]
        answers = await asyncio.gather(*(client.generate("echo", prompt, max_new_tokens=1_500) for prompt in prompts))
        assert [answer.text for answer in answers] == [words(prompt, 1_500) for prompt in prompts]
        return count * 1_500 / (time.perf_counter() - began_at)

    async with fabric(ipc) as made, AsyncClient(ipc) as client, AsyncClient(ipc) as lazy:
        service = await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=1_000)))
        alone = await read(client, 99)
        stopped = lazy.stream("echo", "a", max_new_tokens=12_000)
        await anext(stopped)
        beside = await read(client, 99)
        waiting = sum(len(chunk.token_ids) for chunk in stopped._mailbox.waiting)
        backlog = next(iter(service._sessions.streams.values()))
        assert waiting <= WINDOW_UNITS
        assert backlog.held_units > 0
        assert made.controller.broker.transport_figures().get("parked", 0) == 0
        total = 1 + sum([len(delta.token_ids) async for delta in stopped])
        assert total == 12_000
        row.fault = f"one reader stops, 99 read at {beside / alone:.0%} of their rate without it"
        row.requests = 100


async def test_a_frozen_client_gets_its_whole_text_when_it_goes_on(ipc: str, run_directory: Path, row: Row) -> None:
    row.fault = "client process SIGSTOP for 5 s"
    async with fabric(ipc) as made, processes(run_directory) as children:
        await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=100)))
        child = await Process.start(
            "zfabric.cli.main", "generate", "echo", "a b", "--max-new-tokens", "400", "--temperature", "0",
            "--endpoint", ipc, directory=run_directory,
        )  # fmt: skip
        children.append(child)
        worker = made.controller.broker.registry.workers["w0"]
        await measured(lambda: bool(worker.live), time.perf_counter())
        await asyncio.sleep(0.5)
        child.kill(signal.SIGSTOP)
        await asyncio.sleep(5)
        child.kill(signal.SIGCONT)
        assert child.process.stdout is not None
        text = (await child.process.stdout.read()).decode()
        assert text == words("a b", 400) + "\n"
        assert await child.ended() == 0
        row.requests = 1


@pytest.mark.usefixtures("transport")
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process are set by prlimit")
async def test_files_run_out(run_directory: Path, row: Row) -> None:
    """Connections that nobody can accept any more do not disturb those that are there."""
    row.fault = "file descriptors of the controller exhausted"
    async with processes(run_directory) as children:
        controller = await Process.start(
            "zfabric.cli.controller", "--endpoint", "tcp://127.0.0.1:*", directory=run_directory
        )
        children.append(controller)
        endpoint = (await controller.ready()).partition("endpoint=")[2]
        worker = await Process.start(
            "zfabric.cli.worker", "--endpoint", endpoint, "--tokens-per-second", "50", directory=run_directory
        )
        children.append(worker)
        await worker.ready()
        process = psutil.Process(controller.process.pid)
        async with AsyncClient(endpoint) as client:
            readers = Readers(client, 20, 150)
            await readers.have(5)
            limit = process.num_fds() + 8
            before = process.rlimit(psutil.RLIMIT_NOFILE)
            process.rlimit(psutil.RLIMIT_NOFILE, (limit, before[1]))
            port = int(endpoint.rpartition(":")[2])
            flood = []
            for _ in range(40):
                raw = socket.socket()
                raw.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    raw.connect(("127.0.0.1", port))
                flood.append(raw)
            await asyncio.sleep(1)
            for raw in flood:
                raw.close()
            released_at = time.perf_counter()
            process.rlimit(psutil.RLIMIT_NOFILE, before)
            async with AsyncClient(endpoint) as late:
                assert (await late.generate("echo", "new", max_new_tokens=1)).text == "new "
            await readers.finish()
            readers.check(row, list(range(20)), released_at)
            row.injected = 40
            row.recovery_ms = None


async def test_deadlines_in_every_state(ipc: str, row: Row) -> None:
    row.fault = "deadline while queued, running, and without a controller"
    async with AsyncClient(ipc, connect_timeout_ms=30_000) as early:
        orphan = asyncio.create_task(early.generate("echo", "o", deadline_ms=100, max_new_tokens=1))
        with pytest.raises(DeadlineExceededError):
            await orphan
    async with fabric(ipc) as made, AsyncClient(ipc) as client:
        service = await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=100)), slots=1)
        running = asyncio.create_task(client.generate("echo", "r", deadline_ms=300, max_new_tokens=10_000))
        await measured(lambda: bool(service._sessions.streams), time.perf_counter())
        queued = asyncio.create_task(client.generate("echo", "q", deadline_ms=100, max_new_tokens=1))
        for task, state in ((queued, "QUEUED"), (running, "RUNNING")):
            with pytest.raises(DeadlineExceededError) as caught:
                await task
            assert caught.value.details["state"] == state
        await at_rest(made.controller)
        assert not service._sessions.streams
        row.requests = 3


#: Answers of HTTP APIs, recordings, spans, plots, and whether two hosts' clocks are apart.
DATED = {
    ROOT / "zfabric" / name
    for name in (
        "gateway/clock.py",
        "transport/clock.py",
        "tracing/recorder.py",
        "monitoring/history.py",
        "cli/doctor.py",
    )
}


def test_nothing_depends_on_the_wall_clock() -> None:
    """No module of the fabric reads it, so setting it back changes nothing; but what people and other systems read has dates."""
    for path in set((ROOT / "zfabric").rglob("*.py")) - DATED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = f"{node.value.id}.{node.attr}"
                assert used not in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow"), f"{path}: {used}"
