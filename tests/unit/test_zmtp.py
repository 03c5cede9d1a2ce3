"""ZMTP without sockets: what each rule says, driven by bytes alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from zfabric.zmtp import z85
from zfabric.zmtp.connection import Connection, Ping, Pong, Ready
from zfabric.zmtp.faults import DeniedError, FramingError, GreetingError, HandshakeError, OversizeError, ZmtpError
from zfabric.zmtp.frames import COMMAND, MORE, Bounds, FrameReader, command, head
from zfabric.zmtp.metadata import DEALER, ROUTER, own_properties
from zfabric.zmtp.null import Null

BOUNDS = Bounds(frame_bytes=64 << 20, message_frames=4, message_bytes=100 << 20, command_bytes=1_000)
#: What libzmq 4.3.5 sends, recorded: its greeting, and its READY as a DEALER and as a ROUTER.
GREETING = bytes.fromhex("ff00000000000000017f0301" + "4e554c4c" + "00" * 48)
DEALER_READY = bytes.fromhex("04290552454144590b536f636b65742d54797065000000064445414c4552084964656e7469747900000000")
ROUTER_READY = DEALER_READY.replace(b"DEALER", b"ROUTER")


def null(socket_type: bytes = ROUTER, bounds: Bounds = BOUNDS) -> Connection:
    return Connection(Null(socket_type), bounds)


def events(connection: Connection, data: bytes) -> list[Any]:
    """What bytes lead to."""
    connection.feed(data)
    found = []
    while (event := connection.next_event()) is not None:
        found.append(event)
    return found


def ready(bounds: Bounds = BOUNDS, minor: int = 1) -> Connection:
    """A ROUTER's side of a connection whose handshake is over."""
    connection = null(bounds=bounds)
    greeting = GREETING[:11] + bytes((minor,)) + GREETING[12:]
    assert events(connection, greeting + DEALER_READY) == [Ready(minor, b"")]
    connection.take_output()
    return connection


def test_greeting_and_handshake_are_the_bytes_that_libzmq_sends() -> None:
    for own, own_ready, other_ready in ((ROUTER, ROUTER_READY, DEALER_READY), (DEALER, DEALER_READY, ROUTER_READY)):
        connection = null(own)
        assert connection.take_output() == GREETING
        assert events(connection, GREETING) == []
        assert connection.take_output() == own_ready
        assert not connection.ready
        assert events(connection, other_ready) == [Ready(1, b"")]
        assert connection.take_output() == b""


def test_a_conversation_byte_by_byte_is_the_same() -> None:
    one, two = null(DEALER), null(ROUTER)
    found: list[Any] = []
    for _ in range(3):
        for sender, receiver in ((one, two), (two, one)):
            for byte in sender.take_output():
                found += events(receiver, bytes((byte,)))
    assert found == [Ready(1, b""), Ready(1, b"")]
    body = bytes(300)
    stream = one.encode(b"head", MORE) + one.ping(30) + one.encode(body) + one.encode(b"")
    assert [event for byte in stream for event in events(two, bytes((byte,)))] == [Ping(30), [b"head", body], [b""]]
    assert events(one, two.take_output()) == [Pong()]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"G", GreetingError),
        (b"\xff" + bytes(8) + b"\x00", GreetingError),
        (GREETING[:10] + b"\x01", GreetingError),
        (GREETING[:10] + b"\x02", GreetingError),
        (GREETING.replace(b"NULL", b"NUL\0"), GreetingError),
        (GREETING.replace(b"NULL\0", b"CURVE"), GreetingError),
        (GREETING + b"\x00\x00", FramingError),
        (GREETING + b"\x00\x01x", OversizeError),
        (GREETING + b"\x08", FramingError),
        (GREETING + b"\x05", FramingError),
        (GREETING + b"\x04\x00", HandshakeError),
        (GREETING + b"\x04\x02\x05R", HandshakeError),
        (GREETING + command(b"HELLO", bytes(194)), HandshakeError),
        (GREETING + command(b"PING", b"\0\0"), HandshakeError),
        (GREETING + command(b"ERROR", b"\x03400"), DeniedError),
        (GREETING + command(b"ERROR", b"\x04400"), HandshakeError),
        (GREETING + command(b"ERROR", b""), HandshakeError),
        (GREETING + b"\x06" + (1_001).to_bytes(8, "big"), OversizeError),
        (GREETING + command(b"READY", b"\x00"), HandshakeError),
        (GREETING + command(b"READY", b"\x00\0\0\0\0"), HandshakeError),
        (GREETING + command(b"READY", b"\x01a\0\0\0\x01"), HandshakeError),
        (GREETING + command(b"READY", b"\x01 \0\0\0\0"), HandshakeError),
        (GREETING + command(b"READY", b"\x01a\0\0\0\0\x01A\0\0\0\0"), HandshakeError),
        (GREETING + command(b"READY", own_properties(b"PULL")), HandshakeError),
        (GREETING + command(b"READY", b"\x08Identity\0\0\x01\0" + bytes(256)), HandshakeError),
    ],
)
def test_what_is_wrong_before_the_first_message_is_told_at_once(data: bytes, error: type[ZmtpError]) -> None:
    connection = null()
    with pytest.raises(error):
        events(connection, data)
    with pytest.raises(error):
        connection.next_event()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x80", FramingError),
        (b"\x08\x00", FramingError),
        (b"\x05\x00", FramingError),
        (b"\x00\x01a\x04\x00", HandshakeError),
        (command(b"PING", b"\0"), FramingError),
        (b"\x02" + (BOUNDS.frame_bytes + 1).to_bytes(8, "big"), OversizeError),
        (b"\x02" + b"\xff" * 8, OversizeError),
        (b"\x06" + (1_001).to_bytes(8, "big"), OversizeError),
        (b"\x01\x00" * 4 + b"\x00\x00", OversizeError),
        (b"\x01\x00" * 1_000_000, OversizeError),
    ],
)
def test_what_is_wrong_in_traffic_is_told_at_once(data: bytes, error: type[ZmtpError]) -> None:
    with pytest.raises(error):
        events(ready(), data)


def test_what_came_before_an_error_is_handed_out() -> None:
    connection = ready()
    connection.feed(b"\x00\x01a\x80")
    assert connection.next_event() == [b"a"]
    with pytest.raises(FramingError):
        connection.next_event()


def test_a_wrong_socket_type_is_answered_with_its_reason() -> None:
    connection = null()
    with pytest.raises(HandshakeError, match="PULL"):
        events(connection, GREETING + command(b"READY", own_properties(b"PULL")))
    assert b"\x05ERROR\x13Invalid socket type" in connection.take_output()


def test_metadata_may_have_any_case_and_more_names_and_no_type() -> None:
    for metadata in (b"", b"\x0bSOCKET-TYPE\0\0\0\x06DEALER\x03X-a\0\0\0\x01b"):
        assert events(null(), GREETING + command(b"READY", metadata)) == [Ready(1, b"")]


def test_later_versions_are_spoken_to_as_3_1() -> None:
    greeting = GREETING[:10] + b"\x04\x00" + GREETING[12:]
    assert events(null(), greeting + DEALER_READY) == [Ready(1, b"")]


def test_pings_are_answered_with_their_context_and_not_sent_to_3_0() -> None:
    connection = ready()
    assert events(connection, command(b"PING", b"\x00\x1e" + b"context")) == [Ping(30)]
    assert connection.take_output() == command(b"PONG", b"context")
    events(connection, command(b"PING", bytes(2) + bytes(40)))
    assert connection.take_output() == command(b"PONG", bytes(16))
    assert connection.ping(30) == b"\x04\x07\x04PING\x00\x1e"
    assert ready(minor=0).ping(30) == b""
    assert null().ping(30) == b""


def test_unknown_commands_are_ignored() -> None:
    connection = ready()
    assert events(connection, command(b"SUBSCRIBE", b"a") + command(b"X" * 200) + b"\x00\x00") == [[b""]]
    assert connection.take_output() == b""


def test_a_long_frame_may_be_small_and_an_empty_message_is_one() -> None:
    assert events(ready(), b"\x02" + bytes(7) + b"\x01a" + b"\x03" + bytes(8) + b"\x00\x00") == [[b"a"], [b"", b""]]


def test_the_bytes_of_a_message_are_bounded_before_they_come() -> None:
    bounds = Bounds(frame_bytes=100, message_frames=10, message_bytes=150, command_bytes=100)
    connection = ready(bounds)
    assert events(connection, head(100, MORE) + bytes(100) + head(50) + bytes(50)) == [[bytes(100), bytes(50)]]
    assert events(connection, head(100, MORE) + bytes(100)) == []
    with pytest.raises(OversizeError):
        events(connection, head(51))


def test_bounds_may_change_between_messages() -> None:
    connection = ready(Bounds(10, 1, 10, 100))
    assert events(connection, head(10) + bytes(10)) == [[bytes(10)]]
    connection.set_bounds(BOUNDS)
    assert events(connection, head(11) + bytes(11)) == [[bytes(11)]]


@pytest.mark.parametrize(
    ("data", "whole", "rest"),
    [
        (b"\x00\x01a\x00\x00\x00\x02bc", [[b"a"], [b""], [b"bc"]], b""),
        (b"\x01\x01a\x00\x01b" + head(300, MORE) + bytes(300) + head(400) + bytes(400), [[b"a", b"b"]], None),
        (b"\x02" + bytes(7) + b"\x01a", [[b"a"]], b""),
        (b"\x00\x01a\x01\x01b\x01\x01c\x00\x01d", [[b"a"]], b"\x01\x01b\x01\x01c\x00\x01d"),
        (b"\x00\x01a\x01\x01b\x00", [[b"a"]], b"\x01\x01b\x00"),
        (b"\x00\x01a\x01\x01b", [[b"a"]], b"\x01\x01b"),
        (b"\x00\x01a\x00\x02b", [[b"a"]], b"\x00\x02b"),
        (b"\x00\x01a\x04\x05\x04PING", [[b"a"]], b"\x04\x05\x04PING"),
        (b"\x00\x01a\x80\x01", [[b"a"]], b"\x80\x01"),
        (b"\x01\x01a\x08\x01b", [], b"\x01\x01a\x08\x01b"),
        (b"\x02" + bytes(7), [], b"\x02" + bytes(7)),
    ],
)
def test_messages_that_lie_whole_in_a_read_are_taken_as_next_takes_them(
    data: bytes, whole: list[list[bytes]], rest: bytes | None
) -> None:
    if rest is None:
        whole, rest = [*whole, [bytes(300), bytes(400)]], b""
    reader = FrameReader(BOUNDS)
    reader.feed(data)
    assert reader.take_whole(100) == whole
    assert reader.data[reader.position :] == rest
    connection = ready()
    connection.feed(data)
    assert [connection.next_event() for _ in whole] == whole


@pytest.mark.parametrize(
    "data", [head(101) + bytes(101), head(100, MORE) + bytes(100) + head(51) + bytes(51), head(101, MORE) + bytes(200)]
)
def test_messages_beyond_the_bounds_are_left_to_next_which_refuses_them(data: bytes) -> None:
    bounds = Bounds(frame_bytes=100, message_frames=10, message_bytes=150, command_bytes=100)
    for given in (bounds, Bounds(100, 1, 300, 100)):
        reader = FrameReader(given)
        reader.feed(data)
        assert reader.take_whole(1) == []
        assert reader.position == 0
        with pytest.raises(OversizeError):
            events(ready(given), data)


def test_so_many_messages_are_taken_at_once_and_none_in_the_middle_of_one() -> None:
    reader = FrameReader(BOUNDS)
    reader.feed(b"\x00\x01a" * 5 + b"\x01\x01b\x01\x01c\x00\x01d")
    assert reader.take_whole(2) == [[b"a"]] * 2
    assert reader.take_whole(100) == [[b"a"]] * 3
    assert reader.next() == (MORE, b"b")
    assert reader.take_whole(100) == []
    assert [reader.next(), reader.next(), reader.next()] == [(MORE, b"c"), (0, b"d"), None]


def test_a_small_message_of_two_frames_costs_two_calls() -> None:
    """Of Python functions, where cutting it frame by frame costs more than ten."""
    reader = FrameReader(BOUNDS)
    reader.feed(b"\x01\x06header\x00\x04body")
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        found = reader.take_whole(1)
    finally:
        sys.setprofile(None)
    assert found == [[b"header", b"body"]]
    assert called == ["take_whole", "_take_second"]


def test_a_message_of_two_frames_is_encoded_as_both_are() -> None:
    connection = ready()
    for one in (0, 1, 255, 256, 70_000):
        for two in (0, 255, 256, 70_000):
            first, second = b"a" * one, b"b" * two
            assert connection.encode_pair(first, second) == head(one, MORE) + first + head(two) + second


def test_a_relay_may_move_over_whole_frames() -> None:
    reader = FrameReader(BOUNDS)
    reader.feed(b"\x00\x01a\x00\x01b\x01\x01c")
    assert reader.between_messages
    reader.position = 3
    assert reader.next() == (0, b"b")
    assert reader.between_messages
    assert reader.next() == (MORE, b"c")
    assert not reader.between_messages
    reader.feed(head(5_000) + b"d")
    assert reader.next() is None
    reader.feed(bytes(4_999))
    assert reader.next() == (0, b"d" + bytes(4_999))
    assert reader.between_messages


def test_heads() -> None:
    assert head(255) == b"\x00\xff"
    assert head(256, MORE) == b"\x03" + (256).to_bytes(8, "big")
    assert head(256, COMMAND)[:1] == b"\x06"
    connection = ready()
    for size in (0, 1, 255, 256, 70_000):
        for more in (0, MORE):
            assert connection.encode(bytes(size), more) == head(size, more) + bytes(size)


def test_z85() -> None:
    text = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    assert z85.encode(z85.decode(text)) == text
    assert z85.decode(b"HelloWorld") == bytes.fromhex("864fd26fb559f75b")
    for wrong in (b"abcd", b"abcd~", b"#####", b"abcd\xff"):
        with pytest.raises(ValueError, match="Z85"):
            z85.decode(wrong)
