"""Both ends' sockets against peers that frame as they like."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.raw import RawController, RawPeer
from zfabric.ids import RoutingId
from zfabric.limits import DROPPED_FRAMES_MAX
from zfabric.transport.router import RouterLink
from zfabric.wire.kinds import BEAT, CHUNKS, ENDS, NAMES, SUBMIT, WITH_BODY

Received = tuple[RoutingId, bytes, bytes]
HONEST = (bytes([BEAT]) + b"\x91\x07", bytes([SUBMIT]) + b"header", bytes([CHUNKS]) + b"0000rest")
#: Frames of one message: some of every family, an address such as the ROUTER assigns, nothing.
frame = st.one_of(st.sampled_from([*HONEST, b"", b"\0\0\0\0\x01", bytes([ENDS])]), st.binary(max_size=8))
multipart = st.lists(frame, min_size=1, max_size=6)
#: A message of each kind, with an empty body where the kind has one.
EACH_KIND = [(bytes([kind]) + b"\x90", b"") for kind in NAMES]


def well_formed(frames: list[bytes]) -> bool:
    """Whether these frames are one message of the protocol."""
    return len(frames) == (2 if frames[0][:1] in {bytes([kind]) for kind in WITH_BODY} else 1)


def as_handed(frames: list[bytes]) -> tuple[bytes, bytes]:
    return frames[0], frames[1] if len(frames) > 1 else b""


class Peers:
    """A RouterLink, an honest peer and one that is not."""

    def __init__(self, endpoint: str) -> None:
        self.link = RouterLink((endpoint,))
        self.got: list[Received] = []
        self.malformed: list[tuple[RoutingId, bytes]] = []
        self.honest, self.other = (RawPeer(self.link.endpoints[0]) for _ in range(2))
        self.honest.send(HONEST[0])
        self.address = self.receive(1)[0][0]

    def receive(self, count: int) -> list[Received]:
        """Messages until so many are there."""
        self.got.clear()
        self.malformed.clear()
        while len(self.got) < count:
            self.link.relay({}, self, 0, 16)
        return list(self.got)

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        self.got.append((sender, header, body))

    def link_malformed(self, sender: RoutingId, header: bytes) -> None:
        self.malformed.append((sender, header))

    def link_lost(self, peer: RoutingId) -> None:
        raise AssertionError(f"{peer!r} has no route, so no chunk was sent to it")

    def close(self) -> None:
        self.honest.close()
        self.other.close()
        self.link.close()


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    made = Peers(f"ipc://{tmp_path_factory.mktemp('f')}/c")
    yield made
    made.close()


@settings(max_examples=300, deadline=None)
@given(st.lists(multipart, max_size=6))
def test_no_frames_are_taken_for_another_peers(peers: Peers, messages: list[list[bytes]]) -> None:
    malformed = peers.link.figures.malformed
    for frames in messages:
        peers.other.send(*frames)
    peers.other.send(HONEST[0])
    good = [as_handed(frames) for frames in messages if well_formed(frames)]
    bad = [frames[0] for frames in messages if not well_formed(frames)]
    got = peers.receive(len(good) + 1)
    assert {sender for sender, _, _ in got}.isdisjoint({peers.address})
    assert [(header, body) for _, header, body in got] == [*good, (HONEST[0], b"")]
    assert [header for _, header in peers.malformed] == bad
    assert {sender for sender, _ in peers.malformed} <= {got[-1][0]}
    assert peers.link.figures.malformed - malformed == len(bad)


def test_the_kind_decides_how_many_frames_are_sent(peers: Peers) -> None:
    """And not whether the body holds anything."""
    peers.other.send(HONEST[0])
    ((to, _, _),) = peers.receive(1)
    for header, body in EACH_KIND:
        assert peers.link.send(to, header, body)
        assert peers.other.receive() == ([header, body] if header[0] in WITH_BODY else [header])


def test_a_message_of_very_many_frames_is_dropped_in_portions(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many frames it has, one burst takes a bounded time, and the next message is read as it is."""
    count = 3 * DROPPED_FRAMES_MAX
    receive = peers.link._receive
    reads = 0

    def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return receive(*arguments)

    monkeypatch.setattr(peers.link, "_receive", counted)
    peers.other.send(HONEST[0], *[b"x"] * count)
    peers.other.send(HONEST[0])
    peers.got.clear()
    peers.malformed.clear()
    bursts = []
    while not peers.got:
        reads = 0
        peers.link.relay({}, peers, 0, 16)
        bursts.append(reads)
    assert sum(bursts) > count
    assert max(bursts) < DROPPED_FRAMES_MAX + 16
    assert [header for _, header, _ in peers.got] == [HONEST[0]]
    assert len(peers.malformed) == 1


def test_a_large_body_stays_with_libzmq(peers: Peers) -> None:
    body: Any = b"x" * 1_000_000
    peers.honest.send(HONEST[1], body)
    ((sender, header, received),) = peers.receive(1)
    assert (sender, header, bytes(received)) == (peers.address, HONEST[1], body)
    assert isinstance(received, zmq.Frame)
    assert peers.link.send(sender, header, received)
    assert peers.honest.receive() == [header, body]
    assert not peers.link.send(RoutingId(b"nobody"), header)


@pytest.fixture
async def controller(run_directory: Path) -> AsyncIterator[RawController]:
    made = RawController(f"ipc://{run_directory}/c")
    await made.dealt()
    yield made
    made.close()


async def test_a_dealer_takes_no_frame_for_a_message(controller: RawController) -> None:
    """What lacks its body, or has more frames than its kind, comes with an empty body, or not at all where there is none;
    what follows is read as it is."""
    draw = random.Random(5)
    pieces = [*HONEST, b"", b"\0\0\0\0\x01", bytes([ENDS]), *(header for header, _ in EACH_KIND)]
    expected = []
    malformed = 0
    for _ in range(400):
        frames = [draw.choice(pieces) for _ in range(draw.choice((1, 1, 2, 2, 3, 5)))]
        controller.send(*frames)
        if well_formed(frames):
            expected.append(as_handed(frames))
            continue
        malformed += 1
        if frames[0][:1] and frames[0][0] in WITH_BODY:
            expected.append((frames[0], b""))
    assert await controller.delivered(len(expected)) == expected
    assert controller.link.figures.malformed == malformed
    assert malformed > 100
    assert controller.link.figures.rescued == 0


async def test_the_kind_decides_how_many_frames_a_dealer_sends(controller: RawController) -> None:
    controller.link.send_all(EACH_KIND)
    for header, body in EACH_KIND:
        frames = await asyncio.to_thread(controller.receive)
        assert frames == ([header, body] if header[0] in WITH_BODY else [header])
