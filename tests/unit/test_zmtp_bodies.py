"""Large bodies without sockets: where they are read to, what is copied, and what a claim costs."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest

from tests.unit.test_zmtp import BOUNDS, events, ready
from zfabric import limits
from zfabric.transport.loop_mechanisms import SESSION_BOUNDS, STRANGER_BOUNDS
from zfabric.zmtp import bodies
from zfabric.zmtp.bodies import Body
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.faults import OversizeError
from zfabric.zmtp.frames import MORE, Bounds, FrameReader, head

SIZE = 64 << 20


class Counted(BytesIO):
    """Counts the places that are made for bodies, and how large they are."""

    made: list[int] = []

    def __init__(self, initial: bytes) -> None:
        super().__init__(initial)
        self.made.append(len(initial))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(bodies, "BytesIO", Counted)
    monkeypatch.setattr(Counted, "made", [])
    return Counted.made


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Octets that were read elsewhere and copied to their place."""
    counted: list[int] = []

    def write(self: Body, piece: bytes | memoryview) -> None:
        counted.append(len(piece))
        real(self, piece)

    real = Body.write
    monkeypatch.setattr(Body, "write", write)
    return counted


def fed(reader: FrameReader, data: memoryview) -> int:
    """The octets come as objects of their own."""
    reader.feed(bytes(data))
    return len(data)


def read(reader: FrameReader, data: memoryview) -> int:
    """The octets are read to where they stay, as far as there is room."""
    space = reader.space()
    count = min(len(space), len(data))
    space[:count] = data[:count]
    reader.fill(count)
    return count


@pytest.mark.parametrize("way", [fed, read])
@pytest.mark.parametrize("piece", [1_000, 65_536, 1 << 20])
def test_a_frame_of_64_mib_in_small_reads_costs_its_size_however_small_they_are(
    piece: int, way: Callable[[FrameReader, memoryview], int], places: list[int], written: list[int]
) -> None:
    body = random.Random(3).randbytes(1 << 16) * (SIZE >> 16)
    reader, rest = ready().reader, memoryview(body)
    reader.feed(head(SIZE))
    assert reader.next() is None
    assert reader.missing == SIZE
    tracemalloc.start()
    try:
        calls = 0
        while rest:
            assert reader.next() is None
            rest = rest[way(reader, rest[:piece]) :]
            calls += 1
        frame = reader.next()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frame == (0, body)
    assert reader.missing == 0
    # One copy of what came as objects, none of what was read to its place; and the moves, a third at most.
    assert sum(written) == (SIZE if way is fed else 0)
    assert sum(places) - places[-1] <= SIZE / 3
    assert places[-1] == SIZE
    assert len(places) <= 7
    # A read ends where the room does, so room that grows adds a read each time.
    assert calls <= -(-SIZE // piece) + len(places)
    # The place and the one before it; a second copy of the whole would be twice the size.
    assert peak < 1.3 * SIZE


def test_what_follows_a_large_body_in_the_same_read_is_kept() -> None:
    connection = ready()
    assert events(connection, head(70_000, MORE) + b"a") == []
    assert events(connection, b"a" * 69_999 + head(5_000) + b"b") == []
    assert events(connection, b"b" * 4_999 + b"\x00\x01c") == [[b"a" * 70_000, b"b" * 5_000], [b"c"]]


def test_a_small_frame_in_single_bytes_is_read_again_within_a_bound(places: list[int]) -> None:
    reader = FrameReader(BOUNDS)
    longest = 0
    for byte in head(4_096) + bytes(4_096):
        reader.feed(bytes((byte,)))
        longest = max(longest, len(reader.data))
        frame = reader.next()
    assert frame == (0, bytes(4_096))
    assert places == []
    assert longest <= 4_096 + 9


@pytest.mark.parametrize("claimed", [(64 << 20) + 1, 1 << 30, (1 << 64) - 1])
def test_a_claim_beyond_the_bound_makes_no_place(claimed: int, places: list[int]) -> None:
    with pytest.raises(OversizeError):
        events(ready(), b"\x02" + claimed.to_bytes(8, "big") + bytes(100))
    assert places == []


def claims(bounds: Bounds, size: int, sent: int, count: int) -> tuple[list[Connection], int]:
    """So many connections that announce much and send little; and what they hold together."""
    connections = [ready(bounds) for _ in range(count)]
    said = head(size) + bytes(sent)
    tracemalloc.start()
    try:
        for connection in connections:
            assert events(connection, said) == []
            if sent:
                # Whoever drives it asks for room when there is something to be read.
                assert len(connection.reader.space()) > 0
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return connections, held


def test_a_thousand_connections_that_announce_64_mib_hold_next_to_nothing(places: list[int]) -> None:
    connections, held = claims(SESSION_BOUNDS, limits.FRAME_BYTES_MAX, 0, 1_000)
    assert places == []
    assert held < 1_000 * 1_024
    assert all(connection.reader.missing == limits.FRAME_BYTES_MAX for connection in connections)


@pytest.mark.parametrize(
    ("bounds", "ahead"),
    [(SESSION_BOUNDS, limits.BODY_AHEAD_BYTES), (STRANGER_BOUNDS, limits.STRANGER_BODY_AHEAD_BYTES)],
)
def test_what_is_held_for_a_claim_is_bounded_by_what_has_come_of_it(
    bounds: Bounds, ahead: int, places: list[int]
) -> None:
    """Four times as much, and for the first of it what a peer of its kind is given."""
    _, held = claims(bounds, bounds.frame_bytes, 100, 200)
    assert len(places) == 200
    assert ahead / 4 < places[0] <= ahead
    assert held < 200 * (ahead + 2_048)
    rng = random.Random(4)
    reader = ready(bounds).reader
    reader.feed(head(bounds.frame_bytes))
    assert reader.next() is None
    came = 0
    while reader.missing:
        count = min(rng.choice([1, 500, 70_000]), len(reader.space()))
        assert places[-1] <= max(ahead, 4 * came)
        reader.fill(count)
        came += count


@pytest.mark.parametrize("size", [4_097, 65_537, 262_145, 1_000_003, (1 << 20) + 4_097, 16_980_001])
def test_what_moves_is_a_third_at_most_at_any_size(size: int, places: list[int]) -> None:
    body = Body(size, ahead=4_096)
    while body.missing:
        body.fill(min(len(body.space()), 10_000))
    assert places[-1] == size
    assert sum(places) - places[-1] <= size / 3 + len(places)


def test_what_a_body_is_made_of() -> None:
    """Single octets, pieces larger than the room, and both ways mixed."""
    rng = random.Random(5)
    for _ in range(300):
        whole = rng.randbytes(rng.randrange(1, 2_000))
        body, rest = Body(len(whole), ahead=rng.choice([1, 10, 5_000])), memoryview(whole)
        while rest:
            if rng.random() < 0.5:
                piece = rest[: rng.randrange(len(rest) + 1)]
                body.write(piece)
                rest = rest[len(piece) :]
                continue
            space: Any = body.space()
            count = rng.randrange(min(len(space), len(rest)) + 1)
            assert 1 <= len(space) <= len(rest)
            space[:count] = rest[:count]
            body.fill(count)
            rest = rest[count:]
            assert body.missing == len(rest)
        made = body.take()
        assert made == whole
        assert type(made) is bytes
