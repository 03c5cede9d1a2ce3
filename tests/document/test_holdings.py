"""Peers that do their worst, against what docs/limits-of-peers.md says that the controller holds for them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.broker import Bench, FakeClient, FakeWorker, Peer, carried_of, model_of
from tests.document.holdings import (
    ALIAS_BYTES,
    ALIASES_MAX,
    ALL,
    CLIENT,
    CONNECTION_BYTES,
    FORMER_BYTES,
    MODEL_BYTES,
    RECEIVED_BYTES,
    REQUEST_BYTES,
    SESSION_BYTES,
    SILENT,
    STRANGERS,
    WORKER,
    total,
)  # fmt: skip
from tests.fabric import Process, processes
from zfabric import limits
from zfabric.transport.curve import create_keys
from zfabric.transport.loop_mechanisms import SESSION_BOUNDS
from zfabric.wire.messages import ModelInfo
from zfabric.zmtp.frames import FrameReader, head

#: The longest name, of characters that take the most memory.
LONG = "\U0001f600" * (limits.NAME_LENGTH_MAX - 8)


def held_by(work: Callable[[], None], *peers: Peer) -> int:
    """Bytes that are held after something was done, and were not before. What peers were told is not the controller's."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        for peer in peers:
            peer.inbox.clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_the_sums_are_what_a_host_has() -> None:
    """Strangers are noise to a controller, and one peer cannot fill a host of its own."""
    assert total(STRANGERS) < 256 * 2**20
    assert total(SILENT) - total(STRANGERS) < 20 * 2**30
    assert total(CLIENT) < 2 * 2**30
    assert total(WORKER) < 3 * 2**30
    assert total(ALL) < 3 * 2**30


def test_a_request() -> None:
    bench = Bench()
    worker, client = FakeWorker(bench), FakeClient(bench).hello(1)
    worker.hello("w", models=[model_of(LONG)], slots=1)

    def ask() -> None:
        for number in range(500):
            client.submit(number + 1, model=LONG, body=b"", traceparent="0" * 128, tracestate="0" * 512)

    assert held_by(ask, worker, client) < 500 * REQUEST_BYTES
    assert bench.broker.in_flight == 500

    def lose() -> None:
        worker.cut()

    assert held_by(lose, worker, client) < 500 * FORMER_BYTES


def test_what_a_worker_brings() -> None:
    bench = Bench(recovery_ms=3_000)
    worker = FakeWorker(bench)
    carried = [carried_of(number, number, model=f"{number}{LONG}"[:256], lock=b"x" * 16) for number in range(500)]

    def bring() -> None:
        worker.hello("w", models=[model_of("m")], slots=8, carried=carried)

    assert held_by(bring, worker) < 500 * REQUEST_BYTES + SESSION_BYTES + MODEL_BYTES
    assert len(bench.broker.registry.workers["w"].live) == 500


def test_models_and_aliases() -> None:
    bench = Bench()
    worker = FakeWorker(bench)

    def announce() -> None:
        infos = [
            ModelInfo(
                name=f"{number}{LONG}",
                aliases=[f"{number}-{other}{LONG}"[: limits.NAME_LENGTH_MAX] for other in range(ALIASES_MAX)],
                capabilities=["generate", "embed", "resume"],
            )
            for number in range(20)
        ]
        worker.hello("w", models=infos)
        worker.models = []

    assert held_by(announce, worker) < 20 * (MODEL_BYTES + ALIASES_MAX * ALIAS_BYTES)
    assert {len(model.aliases) for model in bench.broker.registry.models.values()} == {ALIASES_MAX}


def test_sessions() -> None:
    bench = Bench()
    clients = [FakeClient(bench) for _ in range(100)]

    def enter() -> None:
        for number, client in enumerate(clients):
            client.hello(number + 1, secret=b"x" * 64)

    assert held_by(enter, *clients) < 100 * SESSION_BYTES
    assert len(bench.broker.registry.clients) == 100


def test_a_message_that_comes() -> None:
    """All but the last octet of the largest, behind the largest first frame that leaves it room."""
    gc.collect()
    tracemalloc.start()
    try:
        reader = FrameReader(SESSION_BOUNDS)
        reader.feed(head(limits.FRAME_BYTES_MAX))
        assert reader.next() is None
        piece = bytes(limits.FRAME_BYTES_MAX // 64)
        for _ in range(63):
            reader.feed(piece)
            assert reader.next() is None
        assert tracemalloc.get_traced_memory()[1] < RECEIVED_BYTES
    finally:
        tracemalloc.stop()


async def test_strangers(tmp_path: Path) -> None:
    """Handshakes of a real controller with keys, each as far as a stranger gets: greeted, and a command all but sent."""
    for name in ("controller", "user"):
        create_keys(tmp_path, name)
    ring = tmp_path / "keyring.toml"
    ring.write_text('[user]\nrole = "client"\nkey = "user.key"\n')
    count = 300
    async with processes(tmp_path) as children:
        controller = await Process.start(
            "zfabric.cli.controller", "--endpoint", "tcp://127.0.0.1:*", "--key", str(tmp_path / "controller.key_secret"),
            "--keyring", str(ring), directory=tmp_path,
        )  # fmt: skip
        children.append(controller)
        port = int((await controller.ready()).rpartition(":")[2])
        memory = psutil.Process(controller.process.pid).memory_info
        before = memory().rss
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
        command = b"\x06" + limits.COMMAND_BYTES_MAX.to_bytes(8, "big") + bytes(limits.COMMAND_BYTES_MAX - 1)

        async def stop_short(held: contextlib.AsyncExitStack) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            # The writer stays as long as its connection.
            held.callback(lambda: writer.transport.abort())
            writer.write(greeting + command)
            # Where its time is over before this process has come to look, it holds nothing.
            with contextlib.suppress(OSError, EOFError):
                await reader.readexactly(64)

        async with contextlib.AsyncExitStack() as held:
            await asyncio.gather(*(stop_short(held) for _ in range(count)))
            assert memory().rss - before < count * (CONNECTION_BYTES + limits.COMMAND_BYTES_MAX)
