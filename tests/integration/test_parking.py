"""A reader that does not read, on real sockets: what it costs the others, counted and not timed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.fabric import echo_fabric, fabric
from tests.raw import RawController, RawPeer
from zfabric import AsyncClient, TokenStream, limits
from zfabric.ids import RoutingId
from zfabric.transport.router import RouterLink
from zfabric.wire import codec
from zfabric.wire.kinds import ANSWER, BEAT
from zfabric.wire.messages import Beat

_BEAT = bytes([BEAT]) + b"\x91\x07"
_LONG = bytes([ANSWER]) + b"x" * 2_000


class Worker:
    heard_ns = 0


@dataclass
class Route:
    client: RoutingId
    worker: Worker


class Link:
    """A RouterLink whose sends are counted, a reader that does not read, one that does, and a worker."""

    def __init__(self, endpoint: str) -> None:
        self.link = RouterLink((endpoint,))
        self.senders: list[RoutingId] = []
        self.lost: list[RoutingId] = []
        self.stopped, self.reader, self.worker = (RawPeer(endpoint, rcvhwm=1) for _ in range(3))
        self.addresses = [self._address(peer) for peer in (self.stopped, self.reader, self.worker)]
        self.sends = self.raised = 0
        send = self.link._send

        def counted(*arguments: Any) -> Any:
            self.sends += 1
            try:
                return send(*arguments)
            except BaseException:
                self.raised += 1
                raise

        self.link._send = counted

    def _address(self, peer: RawPeer) -> RoutingId:
        peer.send(_BEAT)
        before = len(self.senders)
        while len(self.senders) == before:
            self.link.relay({}, self, 0, 1)
        return self.senders[-1]

    def fill(self, more: int = 0) -> int:
        """Send to the reader that does not read until something is parked, and so many more. Returns how many in all."""
        sent = 0
        while not self.link.figures.parked:
            assert self.link.send(self.addresses[0], _LONG)
            sent += 1
        return sent + sum(self.link.send(self.addresses[0], _LONG) for _ in range(more))

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        self.senders.append(sender)

    def link_malformed(self, sender: RoutingId, header: bytes) -> None:
        raise AssertionError("all messages here have the frames of their kind")

    def link_lost(self, peer: RoutingId) -> None:
        self.lost.append(peer)

    def close(self) -> None:
        for peer in (self.stopped, self.reader, self.worker):
            peer.close()
        self.link.close()


@pytest.fixture
def link(run_directory: Path) -> Iterator[Link]:
    made = Link(f"ipc://{run_directory}/c")
    yield made
    made.close()


def test_others_pay_nothing_for_a_reader_that_does_not_read(link: Link) -> None:
    """A chunk for another reader is two sends, one for each frame, and nothing is raised or parked on its way."""
    link.fill(more=1_000)
    route = Route(link.addresses[1], Worker())
    chunk = codec.pack_chunks(1, [])[0]
    link.sends = link.raised = 0
    parked = link.link.figures.parked
    for _ in range(200):
        link.worker.send(chunk)
        while link.sends == link.raised == 0:
            link.link.relay({link.addresses[2] + chunk[:5]: route}, link, 5, 1)
        assert (link.sends, link.raised) == (2, 0)
        assert link.reader.receive() == [chunk]
        link.sends = 0
    assert route.worker.heard_ns == 5
    assert link.link.figures.parked == parked
    assert link.link.figures.buffered_peers == 1


def test_what_is_parked_is_not_tried_for_each_message_and_ever_more_rarely(link: Link) -> None:
    link.fill(more=1_000)
    link.sends = link.raised = 0
    assert all(link.link.send(link.addresses[0], _LONG) for _ in range(1_000))
    assert link.sends == 0
    until_ns = (link.link.next_retry_ns() or 0) + 10_000_000_000
    while (at_ns := link.link.next_retry_ns() or 0) < until_ns:
        assert link.link.retry_parked(at_ns) == []
    assert link.sends == link.raised <= 10_000 // limits.CONGESTED_RETRY_MAX_MS + 10


def test_who_reads_again_gets_all_in_order(link: Link) -> None:
    count = link.fill(more=300)
    assert link.link.send(link.addresses[0], _BEAT)
    received = 0
    while True:
        now_ns = link.link.next_retry_ns()
        if now_ns is not None:
            assert link.link.retry_parked(now_ns) == []
        if link.stopped.socket.poll(10) and link.stopped.receive() == [_BEAT]:
            break
        received += 1
    assert received >= count
    assert link.link.next_retry_ns() is None
    assert link.link.figures.buffered_bytes == 0


@pytest.mark.parametrize("known", [True, False])
def test_who_has_no_session_may_have_less_parked(link: Link, known: bool) -> None:
    """Beyond its bound a peer counts as gone, and nothing is kept for it."""
    bound = limits.PARKED_BYTES_MAX if known else limits.PARKED_STRANGER_BYTES_MAX
    link.link.is_known = lambda peer: known
    link.fill()
    while link.link.send(link.addresses[0], _LONG):
        assert link.link.figures.buffered_bytes <= bound
    assert bound * 0.7 < link.link.figures.buffered_peer_bytes_max <= bound
    assert link.link.figures.overflowed == 1
    assert link.link.figures.buffered_bytes == link.link.figures.buffered_peers == 0


@pytest.mark.usefixtures("transport")
async def test_a_stranger_who_does_not_read_is_a_small_figure_of_the_status(ipc: str) -> None:
    """Whoever asks without a session and reads no answer is owed little; others get theirs meanwhile."""
    async with echo_fabric(ipc) as (made, client):
        with RawPeer(ipc, rcvhwm=1) as stranger:
            figures = made.controller.broker.transport_figures()
            async with asyncio.timeout(60):
                while figures["overflowed"] == 0:
                    # The controller may read on this loop, so nothing waits here for room.
                    with contextlib.suppress(zmq.Again):
                        for _ in range(200):
                            stranger.socket.send(codec.pack(Beat(1))[0], zmq.NOBLOCK)
                    figures = (await client.status()).transport
                    assert figures["buffered_bytes"] <= limits.PARKED_STRANGER_BYTES_MAX
            assert (await client.generate("echo", "a b", max_new_tokens=2)).text == "a b "
        assert made.controller.rescued == 0


@pytest.mark.usefixtures("transport")
async def test_what_waits_for_each_peer_is_shown(ipc: str) -> None:
    """A worker that does not read its dispatches, in its row and among the slow readers; who reads is not there."""
    async with fabric(ipc), AsyncClient(ipc) as client:
        with RawPeer(ipc, rcvhwm=1) as worker:
            await asyncio.to_thread(worker.hello_as_worker, "slow", "lure", 8_192)
            prompt = "x" * 1_000
            asked: list[TokenStream] = []
            while not (rows := await client.workers())[0].buffered_bytes:
                assert len(asked) < 8_192
                asked += [client.stream("lure", prompt) for _ in range(512)]
            slow = (await client.status()).slow_readers
            assert [row.name for row in slow] == ["worker slow"]
            assert slow[0].buffered_bytes >= rows[0].buffered_bytes > 0
            for stream in asked:
                stream.cancel()
        async with asyncio.timeout(20):
            while (await client.status()).slow_readers:
                await asyncio.sleep(0.005)


async def test_a_controller_that_does_not_read_is_tried_ever_more_rarely(run_directory: Path) -> None:
    """By a worker or client with much to say: a vain try is one send, whatever waits behind it, and all leaves in order."""
    made = RawController(f"ipc://{run_directory}/c")
    link = await made.dealt()
    count = 0
    while not link.congested:
        link.send_all([(_numbered(count), b"")])
        count += 1
    link.send_all([(_numbered(number), b"") for number in range(count, count + 1_000)])
    send, tries = link._send, 0

    def counted(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        return send(*arguments)

    link._send = counted
    delays = []
    for _ in range(12):
        delays.append(link._retry_ms)
        link._drain()
    assert tries == 12
    assert delays[:3] == [limits.CONGESTED_RETRY_MS * 2**step for step in range(3)]
    assert delays[-1] == link._retry_ms == limits.CONGESTED_RETRY_MAX_MS
    for number in range(count + 1_000):
        assert await asyncio.to_thread(made.receive) == [_numbered(number)]
    assert not link.congested
    made.close()


def _numbered(number: int) -> bytes:
    return bytes([BEAT]) + number.to_bytes(4, "big") + b"x" * 2_000
