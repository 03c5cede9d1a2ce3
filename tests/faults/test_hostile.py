"""Real processes, real signals, hostile bytes."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from tests.fabric import Fabric, Process, at_rest, echo_fabric, fabric, processes, words
from tests.raw import RawPeer, RawZmtp
from zfabric import AsyncClient, Credentials
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.client.pending import Resume
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import EngineStalledError, NoWorkerError, ProtocolError
from zfabric.limits import BAD_FRAMES_MAX
from zfabric.transport.curve import create_keys
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Abort, Grant
from zfabric.wire.messages import Beat, Drain, End, Ends, Goodbye, Submit

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.usefixtures("transport")
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
    monkeypatch.setattr("zfabric.core.controller.queues.MODEL_MEMORY_MS", 200)
    async with echo_fabric(ipc) as (made, client):
        await made.remove_worker("w0")
        with pytest.raises(NoWorkerError):
            await client.generate("echo", "a")


@pytest.mark.usefixtures("transport")
async def test_a_slow_reader_costs_nobody_else_anything(ipc: str) -> None:
    """One stream is not read; what is kept for it stays within the window, and it gets all when it reads."""
    async with echo_fabric(ipc) as (made, client):
        stopped = client.stream("echo", "a", max_new_tokens=30_000)
        await anext(stopped)
        readers = [client.generate("echo", f"r{n}", max_new_tokens=2_000) for n in range(20)]
        results = await asyncio.gather(*readers)
        assert [result.text for result in results] == [f"r{n} " * 2_000 for n in range(20)]
        backlog = next(iter(made.services["w0"]._sessions.streams.values()), None)
        waiting = sum(len(chunk.token_ids) for chunk in stopped._mailbox.waiting)
        assert backlog is None or waiting <= 1_024
        total = sum([len(delta.token_ids) async for delta in stopped])
        assert total >= 29_000


@pytest.mark.usefixtures("transport")
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
        dealer.send(bytes([kinds.CLIENT_HELLO]) + b"\x93%c\xa1x\x05" % kinds.PROTOCOL_VERSION)
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


def _submit(request: int, model: str = "echo") -> bytes:
    return codec.pack_envelope(Submit(request=request, attempt=0, operation="generate", model=model, window=1_000))


def _each_kind() -> list[bytes]:
    """One message of every kind that a worker or a client obeys, and some that none does."""
    return [
        codec.pack(Drain(0))[0],
        codec.pack(Abort(instance=0, attempts=[]))[0],
        codec.pack(Grant(client=0, instance=0, lines=[]))[0],
        codec.pack(Goodbye("x"))[0],
        codec.pack(Beat(0))[0],
        codec.pack_unknown_session()[0],
        codec.pack_refused(ProtocolError("x"))[0],
        *(bytes([kind]) + b"\x90" for kind in kinds.NAMES),
        b"\xfe",
        b"",
    ]


def _ask_in_every_shape(raw: RawPeer, instance: int, body: bytes) -> None:
    """Send requests of one body with each number of frames, and wait until each has its end."""
    raw.hello_as_client(instance)
    shapes: list[list[bytes]] = [[b""], [body], [], [body, body], [b"", b""]]
    for number, frames in enumerate(shapes):
        raw.send(_submit(number), *frames)
    ended: set[int | None] = set()
    while len(ended) < len(shapes):
        header, *_ = raw.receive_kind(kinds.ENDS, kinds.FAULT)
        if header[0] == kinds.FAULT:
            ended.add(codec.unpack_control(header).request)
        else:
            ended |= {end.request for end in codec.unpack_envelope(header).ends if end.code}
    assert ended == set(range(len(shapes)))


def _end_in_every_shape(worker: RawPeer, raw: RawPeer, body: bytes) -> None:
    """Have requests ended by terminals of one body with each number of frames: two of them reach the client each time."""
    for number, frames in enumerate([[b""], [body], [], [body, body]]):
        raw.send(_submit(number, "lure"), b"\x90")
        asked = codec.unpack_envelope(worker.receive_kind(kinds.DISPATCH)[0])
        ends = Ends(instance=asked.instance, ends=[End(request=asked.request, attempt=asked.attempt)])
        worker.send(codec.pack_envelope(ends), *frames)
        received = raw.receive()
        assert len(received) == 2
        assert codec.unpack_envelope(received[0]).ends[0].request == number
        assert received[1] == (frames[0] if len(frames) == 1 else b"")


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("with_keys", [True, False])
async def test_no_body_is_taken_for_a_message(ipc: str, run_directory: Path, with_keys: bool) -> None:
    """Two SUBMITs, one with an empty body and one whose body reads as an order to the worker: neither a worker nor a
    client that is asked so obeys, whatever the key may, and each request gets its end."""
    own, worker_credentials, config = None, None, ControllerConfig(endpoints=(ipc,), broker=BrokerConfig(recovery_ms=0))
    if with_keys:
        for name in ("controller", "user", "gpu"):
            create_keys(run_directory, name)
        ring = run_directory / "keyring.toml"
        ring.write_text('[user]\nrole = "client"\nkey = "user.key"\n[gpu]\nrole = "worker"\nkey = "gpu.key"\n')
        config = replace(config, key=run_directory / "controller.key_secret", keyring=ring)
        own, worker_credentials = (
            Credentials.load(run_directory / f"{name}.key_secret", run_directory / "controller.key")
            for name in ("user", "gpu")
        )
    async with Controller(config) as controller:
        made = Fabric(ipc, controller)
        service = await made.add_worker(
            "w0", EchoWorker(EchoOptions(tokens_per_second=200)), credentials=worker_credentials
        )
        async with AsyncClient(ipc, credentials=own) as client:
            victims = [asyncio.create_task(client.generate("echo", f"v{n} x", max_new_tokens=60)) for n in range(20)]
            for instance, body in enumerate(_each_kind()):
                with RawPeer(ipc, own) as raw:
                    await asyncio.to_thread(_ask_in_every_shape, raw, instance, body)
            answers = await asyncio.gather(*victims)
            assert [answer.text for answer in answers] == [words(f"v{n} x", 60) for n in range(20)]
            assert not service._sessions.draining
            assert client.figures()["failovers"] == 0
        await at_rest(controller)
        await made.remove_worker("w0")


@pytest.mark.usefixtures("transport")
async def test_no_terminals_body_is_taken_for_a_message(ipc: str) -> None:
    """The same from a worker that frames its terminals as it likes: their requests end, and no others."""
    async with fabric(ipc) as made:
        await made.add_worker("good", EchoWorker(EchoOptions(tokens_per_second=200)))
        async with AsyncClient(ipc) as client:
            victims = [asyncio.create_task(client.generate("echo", f"v{n} x", max_new_tokens=60)) for n in range(10)]
            for instance, body in enumerate(_each_kind()):
                with RawPeer(ipc) as hostile, RawPeer(ipc) as raw:
                    await asyncio.to_thread(hostile.hello_as_worker, f"hostile-{instance}", "lure")
                    await asyncio.to_thread(raw.hello_as_client, instance)
                    await asyncio.to_thread(_end_in_every_shape, hostile, raw, body)
                async with asyncio.timeout(10):
                    while len(made.controller.broker.registry.workers) > 1:
                        await asyncio.sleep(0.005)
            answers = await asyncio.gather(*victims)
            assert [answer.text for answer in answers] == [words(f"v{n} x", 60) for n in range(10)]


@pytest.mark.usefixtures("transport")
async def test_a_message_without_end_reaches_nobody(run_directory: Path) -> None:
    """Frame after frame, and each says that another follows. A transport that can bound their number ends the connection;
    libzmq cannot, and keeps them, but hands none of them over, and lets go of them with the connection."""
    async with echo_fabric("tcp://127.0.0.1:*") as (made, client):
        link = made.controller._link
        assert link is not None
        # The controller may do its handshakes on this loop.
        with await asyncio.to_thread(RawZmtp, made.endpoint) as hostile:
            taken = await asyncio.to_thread(hostile.send_without_end, 300_000)
            assert taken is not link.bounds_messages
            assert (await client.generate("echo", "a b", max_new_tokens=2)).text == "a b "
        assert made.controller.broker.bad_frames == 0
        assert (await client.generate("echo", "a b", max_new_tokens=2)).text == "a b "
        if not link.bounds_messages:
            assert link.counted()["malformed"] == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere only the daemons seed rand()")
def test_nobody_can_claim_the_address_of_who_comes_next() -> None:
    """libzmq ends the process when a peer has claimed what it would assign next; a controller that is part of a program
    which has not seeded rand(), or has done so in a way that can be guessed, is no exception."""
    program = """
import ctypes, struct
from tests.raw import RawPeer, RawZmtp
from zfabric.transport.router import RouterLink

library = ctypes.CDLL(None)
library.srand(1)
low, high = library.rand(), library.rand()
library.srand(1)
link = RouterLink(("tcp://127.0.0.1:*",))
assert library.rand() == low, "the program's own sequence was disturbed"
addresses = []

class Receiver:
    def link_message(self, sender, header, body):
        addresses.append(sender)

def hear(peer, count):
    peer.send(b"\\x25\\x91\\x07")
    while len(addresses) < count:
        link.relay({}, Receiver(), 0, 1)

following = [b"\\0" + struct.pack(">I", ((low | high << 31) + step) & 0xFFFFFFFF) for step in range(8)]
claims = [RawZmtp(link.endpoints[0], address) for address in following]
with RawPeer(link.endpoints[0]) as first, RawPeer(link.endpoints[0]) as second:
    hear(first, 1)
    hear(second, 2)
assert not set(addresses) & set(following)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "alive\n", done.stderr
