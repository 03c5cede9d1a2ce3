"""The wire's bytes are pinned: what libzmq said is understood, and what it was answered is said again, to the byte.

Conversations with keys are replayed on the event loop's driver alone, whose chance can be drawn from the seed that they were
recorded with. libzmq draws the keys and nonces of a connection by itself, from the system, and can be given no others: it says
other bytes each time, and can open no box of a recording.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.integration.test_loop_links import AtDealer, AtRouter
from tests.recorded import FILE, ROLES, SAID, Conversation, Role, Side
from zfabric import limits
from zfabric.transport.curve import ControllerKeys, Credentials, KeyPair
from zfabric.transport.links import TRANSPORTS, Transport, open_dealer, open_router
from zfabric.wire.codec import EMPTY
from zfabric.zmtp import boxes, z85
from zfabric.zmtp.connection import Ready

CONVERSATIONS = msgspec.convert(json.loads(FILE.read_text())["conversations"], dict[str, Conversation])


def recorded(role: Role, guarded: bool = False) -> Conversation:
    """The conversation in which ours was this role."""
    return CONVERSATIONS[f"{role} {'curve' if guarded else 'null'}"]


@pytest.mark.parametrize("guarded", [False, True], ids=["null", "curve"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_the_core_says_what_it_said_to_libzmq_and_hears_what_libzmq_said(role: Role, guarded: bool, size: int) -> None:
    """However the bytes are cut."""
    side, conversation = Side(role, guarded), recorded(role, guarded)
    said, events = b"", []

    def hear(data: bytes) -> None:
        for start in range(0, len(data), size):
            side.connection.feed(data[start : start + size])
            while (event := side.connection.next_event()) is not None:
                events.append(event)

    for theirs, text in conversation.handshake:
        if theirs:
            hear(bytes.fromhex(text))
        else:
            said += side.connection.take_output()
            assert said.endswith(bytes.fromhex(text))
    assert said == b"".join(bytes.fromhex(text) for theirs, text in conversation.handshake if not theirs)
    assert side.words() == bytes.fromhex(conversation.sent)
    hear(bytes.fromhex(conversation.received))
    assert events == [Ready(1, side.theirs[0] if guarded else b""), *SAID[side.other]]


@pytest.mark.parametrize("role", ROLES)
def test_without_keys_libzmq_says_the_same_bytes_as_we_do(role: Role) -> None:
    """What ours said as a dealer is what libzmq says as a dealer, and so for the router."""
    ours, other = recorded(role), recorded(Side(role, False).other)
    assert ours.sent == other.received
    heard = "".join(text for theirs, text in other.handshake if theirs)
    assert heard == "".join(text for theirs, text in ours.handshake if not theirs)


@contextlib.asynccontextmanager
async def a_path() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        yield Path(name) / "c"


async def play(conversation: Conversation, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Say libzmq's part of a conversation. Returns what was answered, as far as it was recorded."""
    writer.write(b"".join(bytes.fromhex(text) for theirs, text in conversation.handshake if theirs))
    handshake, sent = _expected(conversation)
    # libzmq asks who may connect before it says READY, and takes no message until then.
    answered = await reader.readexactly(len(handshake))
    # As in life: a router says nothing before a dealer has said what it is.
    if conversation in (recorded("dealer"), recorded("dealer", True)):
        answered += await reader.readexactly(len(sent))
        writer.write(bytes.fromhex(conversation.received))
        return answered
    writer.write(bytes.fromhex(conversation.received))
    return answered + await reader.readexactly(len(sent))


def _expected(conversation: Conversation) -> tuple[bytes, bytes]:
    """What ours said in the handshake, and afterwards."""
    handshake = "".join(text for theirs, text in conversation.handshake if not theirs)
    return bytes.fromhex(handshake), bytes.fromhex(conversation.sent)


def _message(frames: list[bytes]) -> tuple[bytes, bytes]:
    return frames[0], frames[1] if len(frames) > 1 else EMPTY


#: With keys, see above.
DRIVERS = pytest.mark.parametrize(
    ("transport", "guarded"),
    [*((name, False) for name in TRANSPORTS), ("loop", True)],
    ids=[*(f"{name} null" for name in TRANSPORTS), "loop curve"],
)


@pytest.fixture
def chance(monkeypatch: pytest.MonkeyPatch) -> Callable[[Role], Side]:
    """Has the drivers draw what was drawn when a conversation was recorded; and no PING comes in between."""
    monkeypatch.setattr(limits, "ZMTP_PING_MS", 60_000)

    def drawn(role: Role) -> Side:
        rng = random.Random(f"{role} True")
        for _ in range(2):
            boxes.key_pair(rng.randbytes)
        monkeypatch.setattr("zfabric.transport.loop_mechanisms.os", SimpleNamespace(urandom=rng.randbytes))
        return Side(role, True)

    return drawn


def _pair(keys: tuple[bytes, bytes]) -> KeyPair:
    return KeyPair(*map(z85.encode, keys))


@DRIVERS
async def test_drivers_of_a_dealer_reproduce_the_recording(
    transport: Transport, guarded: bool, chance: Callable[[Role], Side]
) -> None:
    conversation, at, over = recorded("dealer", guarded), AtDealer(), asyncio.Event()
    came: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    side = chance("dealer")
    credentials = Credentials(_pair(side.own), z85.encode(side.theirs[0])) if guarded else None

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set_result(await play(conversation, reader, writer))
        # What libzmq has not handed over yet is lost with its connection.
        await reader.read()
        writer.close()
        over.set()

    async with a_path() as path:
        server = await asyncio.start_unix_server(serve, path)
        link = open_dealer(f"ipc://{path}", at, random.Random(1), credentials, transport)
        assert await at.next() == "up"
        link.send_all([_message(frames) for frames in SAID["dealer"]])
        assert await asyncio.wait_for(came, 10) == b"".join(_expected(conversation))
        assert [await at.next() for _ in SAID["router"]] == [_message(frames) for frames in SAID["router"]]
        link.close()
        await asyncio.wait_for(over.wait(), 10)
        server.close()
        await server.wait_closed()


@DRIVERS
async def test_drivers_of_a_router_reproduce_the_recording(
    transport: Transport, guarded: bool, chance: Callable[[Role], Side]
) -> None:
    conversation, at = recorded("router", guarded), AtRouter()
    side, asked = chance("router"), []

    def allows(key: bytes) -> bool:
        asked.append(key)
        return True

    keys = ControllerKeys(_pair(side.own), allows) if guarded else None
    routes: dict[bytes, Any] = {}
    async with a_path() as path:
        path.parent.chmod(0o700)
        link = open_router((f"ipc://{path}",), routes, at, keys=keys, transport=transport)
        reader, writer = await asyncio.open_unix_connection(path)
        playing = asyncio.create_task(play(conversation, reader, writer))
        for frames in SAID["dealer"]:
            name, header, body = await at.next()
            assert (header, body) == _message(frames)
        for frames in SAID["router"]:
            assert link.send(name, *_message(frames))
        assert await asyncio.wait_for(playing, 10) == b"".join(_expected(conversation))
        assert asked == ([z85.encode(side.theirs[0])] if guarded else [])
        writer.close()
        await link.close()
