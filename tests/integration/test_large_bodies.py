"""Large bodies through the event loop's links, on both loops: read to where they stay, written without a copy."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.test_loop_links import (
    BEATING,
    DISPATCHED,
    HELLO,
    SUBMITTED,
    AtDealer,
    AtRouter,
    router_at,
    shake_hands,
)
from zfabric import limits
from zfabric.transport.loop_bodies import BodyReader
from zfabric.transport.loop_dealer import LoopDealer
from zfabric.transport.loop_router import LoopRouter
from zfabric.transport.loop_wire import ByteCount, Wire
from zfabric.zmtp.bodies import Body
from zfabric.zmtp.frames import MORE, head

BODY = random.Random(1).randbytes(1 << 20) * 5
Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Octets of large bodies that were not read to where they stay, but copied there."""
    counted: list[int] = []
    real = Body.write

    def write(self: Body, piece: bytes | memoryview) -> None:
        counted.append(len(piece))
        real(self, piece)

    monkeypatch.setattr(Body, "write", write)
    return counted


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are taken when nobody holds their place any more: else each would be copied."""
    real = Body.take

    def take(self: Body) -> bytes:
        body = real(self)
        assert self._into is not None
        # Raises BufferError while any of it is lent.
        self._into.write(b"")
        return body

    monkeypatch.setattr(Body, "take", take)


@pytest.fixture
async def router(ipc: str) -> AsyncIterator[tuple[LoopRouter, AtRouter]]:
    async with router_at(ipc) as made:
        yield made


async def session(link: LoopRouter, at: AtRouter) -> tuple[Peer, Any]:
    """A peer by hand that has said HELLO, and its name."""
    peer = await asyncio.open_unix_connection(link.endpoints[0].removeprefix("ipc://"))
    await shake_hands(*peer)
    peer[1].write(bytes([0, len(HELLO)]) + HELLO)
    return peer, (await at.next())[0]


def frames(header: bytes, body: bytes) -> bytes:
    return head(len(header), MORE) + header + head(len(body)) + body


async def test_what_the_kernel_gives_after_the_first_read_goes_to_its_place(
    router: tuple[LoopRouter, AtRouter], elsewhere: list[int]
) -> None:
    link, at = router
    (_, writer), name = await session(link, at)
    for _ in range(3):
        writer.write(frames(SUBMITTED, BODY) + frames(SUBMITTED, b"small") + bytes([0, len(BEATING)]) + BEATING)
        assert await at.next() == (name, SUBMITTED, BODY)
        assert await at.next() == (name, SUBMITTED, b"small")
        assert await at.next() == (name, BEATING, b"")
    # One read a body is as an object: asyncio's own has 256 KiB, and so has uvloop's.
    assert sum(elsewhere) <= 3 * 256 * 1024
    writer.close()


async def test_a_body_in_drops_and_the_end_of_its_sender(
    router: tuple[LoopRouter, AtRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_READ_BYTES", 100)
    link, at = router
    (_, writer), name = await session(link, at)
    data, body = frames(SUBMITTED, BODY[:9_000]), BODY[:9_000]
    for start in range(0, len(data), 700):
        writer.write(data[start : start + 700])
        await asyncio.sleep(0)
    assert await at.next() == (name, SUBMITTED, body)
    # A peer that goes in the middle of one is told as lost, and nothing of it is handed out.
    writer.write(data[:-200])
    await until_reading(link)
    writer.close()
    assert await asyncio.wait_for(at.lost.get(), 10) == name
    assert at.messages.empty()


async def until_reading(link: LoopRouter) -> Wire:
    """When a large body is on its way."""
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0)
            for peer in link.peers.values():
                transport: Any = peer._transport
                if isinstance(transport.get_protocol(), BodyReader):
                    return peer


async def test_a_peer_that_sends_a_body_is_sent_to_and_told_full_meanwhile(
    router: tuple[LoopRouter, AtRouter],
) -> None:
    """What a transport has to say of writing reaches the wire, whatever reads."""
    link, at = router
    (reader, writer), name = await session(link, at)
    writer.write(frames(SUBMITTED, BODY)[:-100_000])
    peer = await until_reading(link)
    assert link.send(name, DISPATCHED, BODY)
    await asyncio.sleep(0)
    assert peer.full
    sent = frames(DISPATCHED, BODY)
    assert await reader.readexactly(len(sent)) == sent
    async with asyncio.timeout(10):
        while peer.full:
            await asyncio.sleep(0)
    writer.write(BODY[-100_000:])
    assert await at.next() == (name, SUBMITTED, BODY)
    writer.close()


async def test_a_body_counts_as_a_sign_of_life_and_what_follows_it_is_checked(
    router: tuple[LoopRouter, AtRouter],
) -> None:
    link, at = router
    (reader, writer), name = await session(link, at)
    writer.write(frames(SUBMITTED, BODY)[:-100_000])
    peer = await until_reading(link)
    peer._heard = False
    writer.write(BODY[-100_000:] + b"\x80")
    assert await at.next() == (name, SUBMITTED, BODY)
    assert peer._heard
    assert await asyncio.wait_for(at.lost.get(), 10) == name
    assert link.counted()["protocol_errors"] == 1
    assert await reader.read() == b""
    writer.close()


async def test_a_dealer_reads_large_answers_to_their_place(
    router: tuple[LoopRouter, AtRouter], elsewhere: list[int]
) -> None:
    link, at = router
    end = AtDealer()
    dealer = LoopDealer(link.endpoints[0], end, random.Random(1))
    assert await end.next() == "up"
    dealer.send_all([(HELLO, b""), (SUBMITTED, BODY), (SUBMITTED, b"")])
    name = (await at.next())[0]
    assert await at.next() == (name, SUBMITTED, BODY)
    assert await at.next() == (name, SUBMITTED, b"")
    for _ in range(2):
        assert link.send(name, DISPATCHED, BODY)
        assert link.send(name, BEATING)
        assert await end.next() == (DISPATCHED, BODY)
        assert await end.next() == (BEATING, b"")
    assert sum(elsewhere) <= 3 * 256 * 1024
    dealer.close()


class Transport(asyncio.Transport):
    """Notes what is written. What it inherits of `writelines` joins."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written.append(data)


class VectoredTransport(Transport):
    """Takes parts as they are."""

    def writelines(self, list_of_data: Any) -> None:
        self.written += list_of_data


@pytest.mark.parametrize("made", [Transport, VectoredTransport])
async def test_a_large_body_is_written_as_it_is_on_any_transport(made: type[Transport]) -> None:
    from tests.unit.test_zmtp import null

    wire, transport = Wire(null(), asyncio.get_running_loop(), ByteCount()), made()
    wire.connection_made(transport)
    transport.written.clear()
    wire.write_large(b"before", BODY)
    before, body = transport.written
    assert before == b"before"
    assert (body.obj if isinstance(body, memoryview) else body) is BODY
    wire.connection_lost(None)
