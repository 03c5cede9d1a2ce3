"""CURVE without sockets: both roles against each other, and against peers that cheat."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from zfabric.zmtp import boxes
from zfabric.zmtp.connection import Connection, Ping, Pong, Ready
from zfabric.zmtp.curve import OVERHEAD_BYTES, CurveClient, CurveServer
from zfabric.zmtp.faults import DeniedError, FramingError, HandshakeError, OversizeError, ZmtpError
from zfabric.zmtp.frames import MORE, Bounds, command, head
from zfabric.zmtp.metadata import DEALER, ROUTER

BOUNDS = Bounds(frame_bytes=100_000, message_frames=3, message_bytes=150_000, command_bytes=1_000)
Allows = Callable[[bytes], bool]


def everybody(key: bytes) -> bool:
    return True


class Pair:
    """A client and a server with keys, and the bytes between them. The same seed gives the same bytes."""

    def __init__(self, allows: Allows = everybody, *, seed: int = 1, wrong_server: bool = False) -> None:
        rng = random.Random(seed)
        self.server_keys = boxes.key_pair(rng.randbytes)
        self.client_keys = boxes.key_pair(rng.randbytes)
        known = boxes.key_pair(rng.randbytes)[0] if wrong_server else self.server_keys[0]
        self.client = Connection(CurveClient(DEALER, *self.client_keys, known, rng.randbytes), BOUNDS)
        self.server = Connection(CurveServer(ROUTER, *self.server_keys, allows, rng.randbytes), BOUNDS)
        self.sent: list[bytes] = []

    def pass_on(self, sender: Connection, receiver: Connection) -> list[Any]:
        data = sender.take_output()
        self.sent.append(data)
        return events(receiver, data)

    def handshake(self) -> tuple[list[Any], list[Any]]:
        at_client: list[Any] = []
        at_server: list[Any] = []
        for _ in range(3):
            at_server += self.pass_on(self.client, self.server)
            at_client += self.pass_on(self.server, self.client)
        return at_client, at_server


def events(connection: Connection, data: bytes) -> list[Any]:
    connection.feed(data)
    found = []
    while (event := connection.next_event()) is not None:
        found.append(event)
    return found


def ready_pair() -> Pair:
    pair = Pair()
    pair.handshake()
    return pair


def test_both_sides_prove_their_keys() -> None:
    asked: list[bytes] = []

    def allows(key: bytes) -> bool:
        asked.append(key)
        return True

    pair = Pair(allows)
    at_client, at_server = pair.handshake()
    assert at_client == [Ready(1, pair.server_keys[0])]
    assert at_server == [Ready(1, pair.client_keys[0])]
    assert asked == [pair.client_keys[0]]
    # Greeting, HELLO, WELCOME, INITIATE, READY have the sizes that RFC 26 gives them.
    assert [len(data) for data in pair.sent] == [64, 64, 202, 170, 9 + 257 + 35, 2 + 30 + 35]


def test_nobody_who_only_listens_learns_a_key_or_a_text() -> None:
    pair = ready_pair()
    wire = b"".join(pair.sent) + pair.client.encode(b"a very secret text")
    assert pair.client_keys[0] not in wire
    assert b"secret" not in wire
    assert b"DEALER" not in wire


def test_messages_and_pings_both_ways() -> None:
    pair = ready_pair()
    for one, two in ((pair.client, pair.server), (pair.server, pair.client)):
        data = one.encode(b"head", MORE) + one.ping(30) + one.encode(bytes(100_000)) + one.encode(b"")
        assert events(two, data) == [Ping(30), [b"head", bytes(100_000)], [b""]]
        assert events(one, two.take_output()) == [Pong()]


def test_a_key_that_is_not_known_is_told_so() -> None:
    pair = Pair(lambda key: False)
    with pytest.raises(DeniedError):
        pair.handshake()
    assert pair.server.take_output() == command(b"ERROR", b"\x03400")
    with pytest.raises(DeniedError, match="400"):
        events(pair.client, command(b"ERROR", b"\x03400"))


def test_a_client_that_wants_another_server_gets_nowhere() -> None:
    pair = Pair(wrong_server=True)
    with pytest.raises(HandshakeError, match="HELLO"):
        pair.handshake()
    assert pair.server.take_output() == b""


def test_a_server_that_is_another_is_noticed() -> None:
    pair, other = Pair(), Pair(seed=2)
    for made in (pair, other):
        made.pass_on(made.client, made.server)
        made.pass_on(made.server, made.client)
        made.pass_on(made.client, made.server)
    with pytest.raises(HandshakeError, match="WELCOME"):
        events(pair.client, other.server.take_output())


@pytest.mark.parametrize("step", range(2, 6))
def test_no_changed_byte_of_the_handshake_gets_through(step: int) -> None:
    """Any byte of any box, nonce, key or cookie: the side that reads it ends the connection, and never says Ready."""
    reference = Pair()
    reference.handshake()
    size = len(reference.sent[step])
    # What is not protected: padding of HELLO, which is of no meaning.
    padding = range(2 + 8, 2 + 80) if step == 2 else range(0)
    for position in (*range(0, size, 7), size - 1):
        if position in padding:
            continue
        pair = Pair()
        found: list[Any] = []
        sides = (pair.client, pair.server)
        try:
            for number in range(6):
                data = bytearray(sides[number % 2].take_output())
                if number == step:
                    data[position] ^= 0x41
                received = events(sides[(number + 1) % 2], bytes(data))
                if number == step:
                    found += received
        except ZmtpError:
            pass
        assert found == [], f"byte {position} of step {step}"


def test_a_cookie_of_another_connection_is_no_use() -> None:
    pair, other = Pair(), Pair(seed=2)
    for made in (pair, other):
        for _ in range(2):
            made.pass_on(made.client, made.server)
            made.pass_on(made.server, made.client)
    initiate, theirs = bytearray(pair.client.take_output()), other.client.take_output()
    initiate[18:114] = theirs[18:114]
    with pytest.raises(HandshakeError, match="cookie"):
        events(pair.server, bytes(initiate))


@pytest.mark.parametrize(
    "wrong",
    [
        command(b"READY", bytes(40)),
        command(b"INITIATE", bytes(300)),
        command(b"HELLO", bytes(193)),
        command(b"HELLO", b"\x02\x00" + bytes(192)),
        command(b"HELLO", b"\x01\x00" + bytes(192)),
        command(b"HELLO", b"\x01\x00" + bytes(72) + bytes(32) + bytes(7) + b"\x01" + bytes(80)),
        command(b"ERROR", b"\x00"),
    ],
)
def test_wrong_commands_in_place_of_hello(wrong: bytes) -> None:
    pair = Pair()
    pair.pass_on(pair.client, pair.server)
    with pytest.raises(HandshakeError):
        events(pair.server, wrong)


def test_what_is_sent_twice_is_refused() -> None:
    pair = ready_pair()
    data = pair.client.encode(b"pay")
    assert events(pair.server, data) == [[b"pay"]]
    with pytest.raises(HandshakeError, match="twice"):
        events(pair.server, data)


def test_what_is_sent_back_is_refused() -> None:
    pair = ready_pair()
    pair.client.encode(b"first")
    with pytest.raises(HandshakeError, match="MESSAGE"):
        events(pair.client, pair.client.encode(b"pay"))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda pair: b"\x00\x05plain", FramingError),
        (lambda pair: b"\x01" + pair.client.encode(b"a")[1:], FramingError),
        (lambda pair: command(b"MESSAGE", bytes(40)), HandshakeError),
        (lambda pair: head(BOUNDS.frame_bytes + OVERHEAD_BYTES + 1), OversizeError),
        (lambda pair: b"".join(pair.client.encode(b"", MORE) for _ in range(4)), OversizeError),
        (lambda pair: b"".join(pair.client.encode(bytes(80_000), MORE) for _ in range(2)), OversizeError),
        (lambda pair: pair.client.encode(b"x")[:-1] + b"?", HandshakeError),
    ],
)
def test_what_is_wrong_in_traffic(make: Callable[[Pair], bytes], error: type[ZmtpError]) -> None:
    pair = ready_pair()
    with pytest.raises(error):
        events(pair.server, make(pair))


def test_a_message_with_the_command_flag_is_read_too() -> None:
    """As RFC 25 has it; libzmq sends none."""
    pair = ready_pair()
    data = pair.client.encode(b"body")
    assert events(pair.server, bytes((data[0] | 4,)) + data[1:]) == [[b"body"]]


def test_any_bytes_after_the_greeting_are_at_most_a_typed_error() -> None:
    rng = random.Random(3)
    for _ in range(1_000):
        pair = Pair()
        pair.pass_on(pair.client, pair.server)
        pair.pass_on(pair.server, pair.client)
        data = bytearray(pair.client.take_output())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            events(pair.server, bytes(data[: rng.randrange(len(data) + 1)]) + rng.randbytes(rng.randrange(20)))
        except ZmtpError:
            continue
        assert not pair.server.ready


def test_the_same_chance_gives_the_same_bytes() -> None:
    one, two = Pair(), Pair()
    one.handshake()
    two.handshake()
    assert one.sent == two.sent
