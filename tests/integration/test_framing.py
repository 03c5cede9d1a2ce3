"""The controller's socket against peers that frame as they like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from zfabric.ids import RoutingId
from zfabric.transport.router import RouterLink
from zfabric.wire.kinds import BEAT, CHUNKS, ENDS, SUBMIT, WITH_BODY

Received = tuple[RoutingId, bytes, bytes]
HONEST = (bytes([BEAT]) + b"\x91\x07", bytes([SUBMIT]) + b"header", bytes([CHUNKS]) + b"0000rest")
#: Frames of one message: some of every family, an address such as the ROUTER assigns, nothing.
frame = st.one_of(st.sampled_from([*HONEST, b"", b"\0\0\0\0\x01", bytes([ENDS])]), st.binary(max_size=8))


class Peers:
    """A RouterLink, an honest peer and one that is not."""

    def __init__(self, endpoint: str) -> None:
        self.link = RouterLink((endpoint,))
        self.got: list[Received] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.honest, self.other = (self._dealer() for _ in range(2))
        self.honest.send(HONEST[0])
        self.address = self.receive(1)[0][0]

    def _dealer(self) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(self.link.endpoints[0])
        return socket

    def receive(self, count: int) -> list[Received]:
        """Messages until so many are there."""
        self.got.clear()
        while len(self.got) < count:
            self.link.relay({}, self, 0, 16)
        return list(self.got)

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        self.got.append((sender, header, body))

    def link_lost(self, peer: RoutingId) -> None:
        raise AssertionError(f"{peer!r} has no route, so no chunk was sent to it")

    def close(self) -> None:
        self.honest.close()
        self.other.close()
        self.context.term()
        self.link.close()


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    made = Peers(f"ipc://{tmp_path_factory.mktemp('f')}/c")
    yield made
    made.close()


def well_formed(frames: list[bytes]) -> bool:
    """Whether these frames are one message of the protocol."""
    return len(frames) == (2 if frames[0][:1] in {bytes([kind]) for kind in WITH_BODY} else 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(frame, min_size=1, max_size=6), max_size=6))
def test_no_frames_are_taken_for_another_peers(peers: Peers, messages: list[list[bytes]]) -> None:
    malformed = peers.link.figures.malformed
    for frames in messages:
        peers.other.send_multipart(frames)
    peers.other.send(HONEST[0])
    good = [frames for frames in messages if well_formed(frames)]
    got = peers.receive(len(good) + 1)
    assert {sender for sender, _, _ in got}.isdisjoint({peers.address})
    assert [[header, *([body] if header[:1] and header[0] in WITH_BODY else [])] for _, header, body in got] == [
        *good,
        [HONEST[0]],
    ]
    assert peers.link.figures.malformed - malformed == len(messages) - len(good)


def test_a_large_body_stays_with_libzmq(peers: Peers) -> None:
    body: Any = b"x" * 1_000_000
    peers.honest.send_multipart([HONEST[1], body])
    ((sender, header, received),) = peers.receive(1)
    assert (sender, header, bytes(received)) == (peers.address, HONEST[1], body)
    assert isinstance(received, zmq.Frame)
    assert peers.link.send(sender, header, received)
    assert peers.honest.recv_multipart() == [header, body]
    assert not peers.link.send(RoutingId(b"nobody"), header)
