"""ZMTP beyond its first door: what a server says to who connects, and what comes from a peer whose keys are right."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Final

from tests.fuzz import script
from tests.fuzz.doors import BOUNDS, feed, take_events
from zfabric.zmtp import boxes
from zfabric.zmtp.connection import Connection
from zfabric.zmtp.curve import CurveClient, CurveServer
from zfabric.zmtp.faults import ZmtpError
from zfabric.zmtp.frames import COMMAND, MORE, command, head
from zfabric.zmtp.metadata import DEALER, ROUTER
from zfabric.zmtp.null import Null

SERVER_KEYS: Final = boxes.key_pair(random.Random(1).randbytes)
CLIENT_KEYS: Final = boxes.key_pair(random.Random(3).randbytes)


def server() -> Connection:
    """A server that lets every key in, and draws the same numbers each time."""
    return Connection(CurveServer(ROUTER, *SERVER_KEYS, lambda _: True, random.Random(2).randbytes), BOUNDS)


def client() -> Connection:
    """A client of that server."""
    return Connection(CurveClient(DEALER, *CLIENT_KEYS, SERVER_KEYS[0], random.Random(4).randbytes), BOUNDS)


def zmtp_dealer(data: bytes) -> None:
    """Bytes of a server, to a client without keys or, by the first bit, with keys."""
    with_keys = bool(data) and data[0] & 1
    feed(client() if with_keys else Connection(Null(DEALER), BOUNDS), data)


def zmtp_keyed(data: bytes) -> None:
    """A peer goes through so many honest steps of its handshake as the first byte says, and then says what stands in a script.

    The parts of the script are frames as they are, commands, or what is sealed with the keys of the connection.
    """
    first = data[0] if data else 0
    one, other = server(), client()
    heard, speaks = (one, other) if first & 1 else (other, one)
    with contextlib.suppress(ZmtpError):
        introduce(heard, speaks, steps=first >> 1 & 7)
        for step in script.read(data[1:]):
            heard.feed(_said(speaks, step))
            take_events(heard)


def introduce(heard: Connection, speaks: Connection, steps: int) -> None:
    """Go through the handshake for so many steps, or to its end."""
    for _ in range(steps):
        # Both, always: either may have something to say.
        if not _carry(speaks, heard) | _carry(heard, speaks):
            return


def _carry(source: Connection, target: Connection) -> bool:
    """Bring over what one side has to say. Returns: whether it had."""
    said = source.take_output()
    target.feed(said)
    take_events(target)
    return bool(said)


def _said(speaks: Connection, step: script.Step) -> bytes:
    flags = (0, MORE, COMMAND, 0)[step.who >> 2 & 3]
    match step.who & 3:
        case 0:
            return step.header + step.body
        case 1:
            return command(step.header[:255] or b"x", step.body)
        case _ if speaks.ready:
            sealed = speaks.mechanism.seal(flags, step.header + step.body)
            return head(len(sealed)) + sealed
        case _:
            return head(len(step.body), flags) + step.body


def keyed_streams() -> Iterator[bytes]:
    """Scripts for each step of the handshake, from both sides."""
    words = [
        script.Step(0, b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE", bytes(47)),
        script.Step(1, b"HELLO", bytes(194)),
        script.Step(1, b"ERROR", b"\x03no!"),
        script.Step(2, b"a message", b""),
        script.Step(2 | 4, b"a first frame", b""),
        script.Step(2 | 8, b"\x04PING", b"\0\1context"),
    ]
    yield from (bytes([first]) + script.written(words[place:]) for first in range(14) for place in range(len(words)))


def server_streams() -> Iterator[bytes]:
    """What servers say: as it is said without keys, and with this client's own."""
    one, other = server(), client()
    said = one.take_output()
    other.feed(said)
    take_events(other)
    one.feed(other.take_output())
    take_events(one)
    yield b"\xff" + said + one.take_output()
    without = Connection(Null(ROUTER), BOUNDS)
    asking = Connection(Null(DEALER), BOUNDS)
    without.feed(asking.take_output())
    take_events(without)
    said = without.take_output()
    for step in (2, 8, 254):
        yield bytes([step]) + said + head(3) + b"abc" + command(b"PING", b"\0\1context")
    yield b"\xfe" + said[:64] + command(b"ERROR", b"\x03no!")
