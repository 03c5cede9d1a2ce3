"""Real processes, real signals, hostile bytes."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
import zmq

from tests.fabric import Process, echo_fabric, fabric, processes, words
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.core.pending import Resume
from zfabric.errors import EngineStalledError, NoWorkerError
from zfabric.limits import BAD_FRAMES_MAX
from zfabric.wire import kinds

CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"


async def test_a_controller_killed_in_mid_stream(endpoint: str, run_directory: Path) -> None:
    """100 streams go on from the reader's next token when a new controller comes up on the same endpoint."""
    async with processes(run_directory) as children:
        first = await Process.start(CONTROLLER, "--endpoint", endpoint, directory=run_directory)
        children.append(first)
        endpoint = (await first.ready()).partition("endpoint=")[2]
        for name in ("w1", "w2"):
            worker = await Process.start(
                WORKER, "--endpoint", endpoint, "--tokens-per-second", "60", "--name", name, directory=run_directory
            )
            children.append(worker)
            await worker.ready()
        async with AsyncClient(endpoint) as client:
            streams = [client.stream("echo", f"s{n} x y", max_new_tokens=200) for n in range(100)]
            for stream in streams:
                await anext(stream)
            first.kill()
            await first.ended()
            await asyncio.sleep(0.5)
            second = await Process.start(CONTROLLER, "--endpoint", endpoint, directory=run_directory)
            children.append(second)
            await second.ready()
            for number, stream in enumerate(streams):
                async for _ in stream:
                    pass
                assert stream.text == words(f"s{number} x y", 200)
                assert stream.usage is not None
                assert stream.usage.completion_tokens == 200
            figures = client.figures()
            assert figures["claims"] == 100
            assert figures["gaps"] == figures["repeated_chunks"] == 0
            # Unseeded streams could not have been started anew: all of them were taken over.
            assert figures["failovers"] == 0
            assert (await client.status()).recovered == 100


@pytest.mark.parametrize("resume", ["never", "exact"])
async def test_an_engine_that_hangs_while_its_process_beats(ipc: str, resume: Resume) -> None:
    class Hanging(EchoWorker):
        """Stops stepping after some tokens, but its event loop goes on."""

        def _step(self, now: float, interval: float) -> None:
            if self._steps_taken < 5 or not hanging:
                super()._step(now, interval)

    hanging = True
    async with fabric(ipc, beat_ms=50, lease_ms=300, stall_ms=400) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", Hanging(EchoOptions(tokens_per_second=200)))
        stream = client.stream("echo", "a b", max_new_tokens=50, temperature=0, resume=resume)
        await anext(stream)
        await made.add_worker("w1")
        if resume == "never":
            with pytest.raises(EngineStalledError):
                async for _ in stream:
                    pass
        else:
            async for _ in stream:
                pass
            assert stream.text == words("a b", 50)
            assert stream.worker == "w1"
        hanging = False


async def test_two_workers_of_one_name(ipc: str) -> None:
    async with echo_fabric(ipc) as (made, client):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await made.add_worker("w0", EchoWorker(EchoOptions(model_names=("other",))))
        assert [model.name for model in await client.models()] == ["echo"]
        assert (await client.generate("echo", "a", max_new_tokens=1)).worker == "w0"


async def test_ten_thousand_requests_for_eight_slots(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", slots=8)
        running = made.controller.broker.registry.workers["w0"]
        tasks = [asyncio.create_task(client.generate("echo", f"q{n}", max_new_tokens=1)) for n in range(10_000)]
        most = 0
        while not all(task.done() for task in tasks[-100:]):
            most = max(most, running.in_flight)
            await asyncio.sleep(0.005)
        results = await asyncio.gather(*tasks)
        assert all(result.text == f"q{number} " for number, result in enumerate(results))
        assert most == 8


async def test_the_last_worker_gone_is_an_error_when_it_stays_away(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.core.queues.MODEL_MEMORY_MS", 200)
    async with echo_fabric(ipc) as (made, client):
        await made.remove_worker("w0")
        with pytest.raises(NoWorkerError):
            await client.generate("echo", "a")


async def test_a_slow_reader_costs_nobody_else_anything(ipc: str) -> None:
    """One stream is not read; what is kept for it stays within the window, and it gets all when it reads."""
    async with echo_fabric(ipc) as (made, client):
        stopped = client.stream("echo", "a", max_new_tokens=30_000)
        await anext(stopped)
        readers = [client.generate("echo", f"r{n}", max_new_tokens=2_000) for n in range(20)]
        results = await asyncio.gather(*readers)
        assert [result.text for result in results] == [f"r{n} " * 2_000 for n in range(20)]
        backlog = next(iter(made.services["w0"]._session.streams.values()), None)
        waiting = sum(len(chunk.token_ids) for chunk in stopped._mailbox.waiting)
        assert backlog is None or waiting <= 1_024
        total = sum([len(delta.token_ids) async for delta in stopped])
        assert total >= 29_000


async def test_garbage_stops_nobody(run_directory: Path) -> None:
    async with echo_fabric("tcp://127.0.0.1:*") as (made, client):
        port = int(made.endpoint.rpartition(":")[2])
        for data in (
            b"GET / HTTP/1.1\r\n\r\n",
            os.urandom(4096),
            b"\xff" * 10 + b"\x7f\x03" + b"\0" * 60,
            b"\x03\0ID\x06\0hello",
        ):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(data)
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(made.endpoint)
        for frames in (
            [b""], [b"", b""], [b"\x11"], [b"a", b"b", b"c", b"d"], [bytes([kinds.SUBMIT]), b"x"], [b"\xfe"], [b"\xfe", b""],
            [bytes([kinds.CLIENT_HELLO]) + b"\x91" * 50_000], [bytes([kinds.CHUNKS]) * 5, b"\0"], [bytes([kinds.CHUNKS]) * 6],
            [os.urandom(5000), os.urandom(10)],
        ):  # fmt: skip
            dealer.send_multipart(frames)
        # The same from a peer that has a session.
        dealer.send(bytes([kinds.CLIENT_HELLO]) + b"\x93\x01\xa1x\x05")
        for _ in range(BAD_FRAMES_MAX * 2):
            dealer.send(bytes([kinds.CANCEL]) + os.urandom(8))
            dealer.send_multipart([bytes([kinds.ENDS]), b""])
        assert (await client.generate("echo", "still here", max_new_tokens=2)).text == "still here "
        # The controller runs on this loop: let it see everything before the answers are counted.
        async with asyncio.timeout(10):
            while made.controller.broker.bad_frames < 3 * BAD_FRAMES_MAX:
                await asyncio.sleep(0.01)
        faults = 0
        while dealer.poll(50):
            faults += dealer.recv_multipart()[0][0] == kinds.FAULT
        assert 1 <= faults <= BAD_FRAMES_MAX
        assert made.controller.broker.bad_frames >= BAD_FRAMES_MAX
        dealer.close()
        context.term()
