"""Connections that are lost while both ends live, and a controller that is stopped: what runs goes on where it runs."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.fabric import Process, at_rest, fabric, processes, words
from tests.faults.conftest import Row
from tests.faults.proxy import proxy
from tests.faults.readers import Readers, measured
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.limits import CLAIM_MS, ZMTP_TIMEOUT_MS

CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"
OPTIONS = EchoOptions(tokens_per_second=60)
TCP = "tcp://127.0.0.1:*"


@pytest.mark.usefixtures("transport")
async def test_a_client_whose_connection_is_lost_takes_up_its_streams(row: Row) -> None:
    row.fault = "connection of a client cut, three times"
    async with fabric(TCP) as made, proxy(made.endpoint) as line, AsyncClient(line.endpoint) as client:
        await made.add_worker("w0", EchoWorker(OPTIONS), slots=40)
        readers = Readers(client, 40, 150)
        cut_at = 0.0
        for tokens in (10, 40, 70):
            await readers.have(tokens)
            cut_at = time.perf_counter()
            line.cut()
        await readers.finish()
        readers.check(row, list(range(40)), cut_at)
        row.injected = 3
        figures = client.figures()
        assert figures["failovers"] == figures["gaps"] == 0
        assert line.connections == 4
        status = await client.status()
        assert (status.dispatched, status.recovered) == (40, 120)


async def test_answers_that_end_while_their_client_is_away_are_there_when_it_is_back(row: Row) -> None:
    row.fault = "connection of a client cut just before the end"
    async with fabric(TCP) as made, proxy(made.endpoint) as line, AsyncClient(line.endpoint) as client:
        await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=1_000)), slots=20)
        readers = Readers(client, 20, 200)
        await readers.have(150)
        cut_at = time.perf_counter()
        line.cut()
        await readers.finish()
        readers.check(row, list(range(20)), cut_at)
        figures = client.figures()
        assert figures["failovers"] == figures["gaps"] == 0
        assert (await client.status()).dispatched == 20


@pytest.mark.usefixtures("transport")
async def test_a_worker_whose_connection_is_lost_goes_on_with_what_cannot_go_on_elsewhere(row: Row) -> None:
    row.fault = "connection of a worker cut, answers that no other worker could go on with"
    async with fabric(TCP) as made, proxy(made.endpoint) as line, AsyncClient(made.endpoint) as client:
        made.endpoint, direct = line.endpoint, made.endpoint
        await made.add_worker("cut", EchoWorker(OPTIONS), slots=20)
        made.endpoint = direct
        streams = [client.stream("echo", f"s{n} x", max_new_tokens=150, resume="never") for n in range(20)]
        for stream in streams:
            await anext(stream)
        await made.add_worker("other", EchoWorker(OPTIONS))
        line.cut()
        for number, stream in enumerate(streams):
            async for _ in stream:
                pass
            assert stream.text == words(f"s{number} x", 150)
            assert stream.worker == "cut"
        figures = client.figures()
        assert figures["failovers"] == figures["gaps"] == 0
        row.requests = figures["claims"]
        assert row.requests == 20


async def test_a_client_that_dies_is_waited_for_and_no_longer(row: Row) -> None:
    """Nobody can tell a death from a lost connection: the engine works on for CLAIM_MS."""
    row.fault = "client gone for good"
    async with fabric(TCP) as made, proxy(made.endpoint) as line:
        service = await made.add_worker("w0", EchoWorker(OPTIONS))
        client = AsyncClient(line.endpoint)
        await client.__aenter__()
        stream = client.stream("echo", "a", max_new_tokens=100_000)
        await anext(stream)
        gone_at = time.perf_counter()
        # What a dead process does not do: come back, or say goodbye.
        link, client._connection._link = client._connection._link, None
        assert link is not None
        link.close()
        row.detection_ms = await measured(lambda: not service._sessions.streams, gone_at)
        assert row.detection_ms >= CLAIM_MS - 100
        row.requests = 1
        await at_rest(made.controller)
        assert not made.controller.broker.registry.clients


async def _stopped(row: Row, run_directory: Path, endpoint: str, seconds: float, *options: str) -> tuple[int, int]:
    """Stop a controller's process for some time under 40 streams. Returns failovers and workers lost."""
    async with processes(run_directory) as children, AsyncClient(endpoint) as client:
        controller = await Process.start(CONTROLLER, "--endpoint", endpoint, *options, directory=run_directory)
        children.append(controller)
        await controller.ready()
        for name in ("w1", "w2"):
            worker = await Process.start(
                WORKER, "--endpoint", endpoint, "--name", name, "--tokens-per-second", "40", "--slots", "40",
                directory=run_directory,
            )  # fmt: skip
            children.append(worker)
            await worker.ready()
        readers = Readers(client, 40, 250)
        await readers.have(10)
        stopped_at = time.perf_counter()
        controller.kill(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        controller.kill(signal.SIGCONT)
        await readers.finish()
        readers.check(row, list(range(40)), stopped_at)
        figures = client.figures()
        assert figures["gaps"] == 0
        status = await client.status()
        assert status.workers == 2
        return figures["failovers"], status.workers_lost


async def test_a_stopped_controller_reads_before_it_judges(ipc: str, run_directory: Path, row: Row) -> None:
    """Every lease has lapsed when it goes on, and the beats of all wait in its socket."""
    seconds = 2.0
    row.fault = f"controller SIGSTOP for {seconds:.0f} s, twice its leases"
    assert seconds * 1_000 < ZMTP_TIMEOUT_MS
    failovers, lost = await _stopped(row, run_directory, ipc, seconds, "--beat-ms", "300", "--lease-ms", "1000")
    assert (failovers, lost) == (0, 0)


@pytest.mark.usefixtures("transport")
async def test_a_controller_that_is_stopped_for_longer_than_the_transport_waits(
    ipc: str, run_directory: Path, row: Row
) -> None:
    """All connections are lost at both ends meanwhile."""
    row.fault = "controller SIGSTOP for 4 s"
    await _stopped(row, run_directory, ipc, 4.0)
