"""ZMTP against any bytes: events or a typed error, and the same ones however the bytes are cut."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_zmtp import DEALER_READY, GREETING
from zfabric.zmtp.connection import Connection, Ping, Pong, Ready
from zfabric.zmtp.faults import ZmtpError
from zfabric.zmtp.frames import COMMAND, MORE, Bounds, command, head
from zfabric.zmtp.metadata import ROUTER
from zfabric.zmtp.null import Null

BOUNDS = Bounds(frame_bytes=20_000, message_frames=3, message_bytes=30_000, command_bytes=600)
HANDSHAKE = GREETING + DEALER_READY

body = st.one_of(st.binary(max_size=40), st.integers(0, 21_000).map(bytes))
frame = st.builds(lambda data, flags: head(len(data), flags) + data, body, st.sampled_from([0, MORE]))
order = st.builds(command, st.sampled_from([b"PING", b"PONG", b"READY", b"SUBSCRIBE"]), st.binary(max_size=30))
#: A stream that is mostly right, so that it gets far.
stream = st.lists(st.one_of(frame, order, st.binary(max_size=4)), max_size=12).map(b"".join)


def outcome(pieces: list[bytes]) -> tuple[list[Any], str, bytes]:
    """Events, the error's type, and what is answered."""
    connection = Connection(Null(ROUTER), BOUNDS)
    events: list[Any] = []
    error = ""
    try:
        for piece in pieces:
            connection.feed(piece)
            while (event := connection.next_event()) is not None:
                events.append(event)
    except ZmtpError as found:
        error = type(found).__name__
    return events, error, connection.take_output()


def check(events: list[Any]) -> None:
    """Whatever comes out is within the bounds."""
    for event in events:
        assert isinstance(event, (list, Ready, Ping, Pong))
        if isinstance(event, list):
            assert 1 <= len(event) <= BOUNDS.message_frames
            assert all(type(part) is bytes and len(part) <= BOUNDS.frame_bytes for part in event)
            assert sum(map(len, event)) <= BOUNDS.message_bytes


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda data: GREETING + data)))
def test_any_bytes_give_events_or_a_typed_error(data: bytes) -> None:
    check(outcome([data])[0])


@settings(max_examples=400, deadline=None)
@given(stream, st.lists(st.integers(1, 5_000), max_size=20))
def test_events_do_not_depend_on_how_the_bytes_are_cut(data: bytes, sizes: list[int]) -> None:
    data = HANDSHAKE + data
    pieces, rest = [], data
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = outcome([data])
    check(whole[0])
    assert outcome([*[piece for piece in pieces if piece], rest]) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(body, min_size=1, max_size=3), max_size=6))
def test_messages_come_out_as_they_went_in(messages: list[list[bytes]]) -> None:
    sender = Connection(Null(ROUTER), BOUNDS)
    fitting = [
        frames
        for frames in messages
        if sum(map(len, frames)) <= BOUNDS.message_bytes and all(len(part) <= BOUNDS.frame_bytes for part in frames)
    ]
    data = b"".join(
        sender.encode(part, MORE if index < len(frames) - 1 else 0)
        for frames in fitting
        for index, part in enumerate(frames)
    )
    assert outcome([HANDSHAKE, data])[0][1:] == fitting


def test_a_right_stream_with_wrong_bits_is_never_more_than_a_typed_error() -> None:
    """A fuzz loop: a valid conversation, some bytes changed, cut anywhere."""
    rng = random.Random(7)
    right = HANDSHAKE + command(b"PING", b"\0\x1eabc") + head(3, MORE) + b"abc" + head(300) + bytes(300) + head(0)
    endings = set()
    for _ in range(20_000):
        data = bytearray(right)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 2, 4, 255, rng.randrange(256)))
        cut = rng.randrange(len(data))
        events, error, _ = outcome([bytes(data[:cut]), bytes(data[cut:])])
        check(events)
        endings.add(error)
    assert endings >= {"", "GreetingError", "FramingError", "HandshakeError", "OversizeError"}
    assert COMMAND & MORE == 0
