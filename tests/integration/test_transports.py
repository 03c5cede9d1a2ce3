"""One suite for all pairings of drivers: what a controller's link and a dealer's link promise, whoever serves them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.integration.test_loop_links import (
    BEATING,
    DISPATCHED,
    HELLO,
    SUBMITTED,
    AtDealer,
    AtRouter,
    Route,
    pair_of_keys,
)
from tests.unit.test_zmtp import GREETING, ROUTER_READY
from zfabric import limits
from zfabric.errors import AuthenticationError, ConfigurationError, EndpointInUseError, IncorrectKeyError
from zfabric.ids import RoutingId
from zfabric.transport.curve import ControllerKeys, Credentials, KeyPair
from zfabric.transport.links import DealerDriver, RouterDriver, Transport, choose, open_dealer, open_router
from zfabric.wire.kinds import BEAT, CHUNKS
from zfabric.zmtp.frames import MORE, command, head
from zfabric.zmtp.metadata import own_properties

CHUNK = bytes([CHUNKS]) + b"\0\0\0\x09"
DEALER_READY = command(b"READY", own_properties(b"DEALER"))
SERVER, KNOWN, STRANGER = pair_of_keys(), pair_of_keys(), pair_of_keys()


class Side:
    """A router's link, its receiver, and the dealers that the test has made."""

    def __init__(self, link: RouterDriver, at: AtRouter, dealers: Transport, guarded: bool) -> None:
        self.link = link
        self.at = at
        self.routes: dict[bytes, Any] = {}
        self._dealers = dealers
        self._guarded = guarded
        self.made: list[DealerDriver] = []
        self.logged: list[dict[str, object]] = []

    def dealer(self, keys: KeyPair = KNOWN, server: KeyPair = SERVER) -> tuple[DealerDriver, AtDealer]:
        at = AtDealer()
        credentials = Credentials(keys, server.public) if self._guarded else None
        link = open_dealer(self.link.endpoints[0], at, random.Random(1), credentials, self._dealers)
        self.made.append(link)
        return link, at

    async def greeted(self) -> tuple[DealerDriver, AtDealer, RoutingId]:
        """A dealer that has said HELLO."""
        link, at = self.dealer()
        assert await at.next() == "up"
        link.send_all([(HELLO, b"")])
        name, header, _ = await self.at.next()
        assert header == HELLO
        return link, at, name


@pytest.fixture(params=["libzmq", "loop"])
def router(request: pytest.FixtureRequest) -> Transport:
    """The controller's driver."""
    return choose(request.param)


@pytest.fixture(params=["libzmq", "loop"])
def dealer(request: pytest.FixtureRequest) -> Transport:
    """The other end's driver."""
    return choose(request.param)


@pytest.fixture(params=[False, True], ids=["open", "keys"])
def guarded(request: pytest.FixtureRequest) -> bool:
    """Whether there are keys."""
    return bool(request.param)


@contextlib.asynccontextmanager
async def side(endpoint: str, router: Transport, dealer: Transport, guarded: bool = False) -> AsyncIterator[Side]:
    at = AtRouter()
    routes: dict[bytes, Any] = {}
    keys = ControllerKeys(SERVER, lambda key: key == KNOWN.public) if guarded else None
    logged: list[dict[str, object]] = []
    link = open_router(
        (endpoint,), routes, at, keys=keys, transport=router, log=lambda event, **fields: logged.append(fields)
    )
    made = Side(link, at, dealer, guarded)
    made.logged = logged
    made.routes = routes
    try:
        yield made
    finally:
        for opened in made.made:
            opened.close()
        await link.close()


async def test_messages_both_ways_in_order(endpoint: str, router: Transport, dealer: Transport, guarded: bool) -> None:
    async with side(endpoint, router, dealer, guarded) as made:
        link, at, name = await made.greeted()
        assert link.connected
        assert made.link.key_of(name) == (KNOWN.public if guarded else b"")
        large = random.Random(1).randbytes(5_000_000)
        bodies = [large, b"x", bytes(255), bytes(256), bytes(65_536), bytes(65_537)]
        link.send_all([(SUBMITTED, body) for body in bodies] + [(BEATING, b"")] * 500)
        for body in bodies:
            assert await made.at.next() == (name, SUBMITTED, body)
        assert [await made.at.next() for _ in range(500)] == [(name, BEATING, b"")] * 500
        for body in bodies:
            assert made.link.send(name, DISPATCHED, body)
            assert made.link.send(name, BEATING)
        for body in bodies:
            assert await at.next() == (DISPATCHED, body)
            assert await at.next() == (BEATING, b"")


async def test_chunks_pass_by_themselves(endpoint: str, router: Transport, dealer: Transport, guarded: bool) -> None:
    async with side(endpoint, router, dealer, guarded) as made:
        worker, _, worker_name = await made.greeted()
        readers = [await made.greeted() for _ in range(2)]
        keys = [bytes([CHUNKS]) + index.to_bytes(4, "big") for index in range(2)]
        routes = [Route(name) for _, _, name in readers]
        for key, route in zip(keys, routes, strict=True):
            made.routes[worker_name + key] = route
        rng = random.Random(3)
        sent: list[list[bytes]] = [[], []]
        messages = []
        for _ in range(600):
            index = rng.randrange(2)
            chunk = keys[index] + rng.randbytes(rng.choice((0, 3, 40, 246, 247, 251, 260, 3_000, 9_000)))
            sent[index].append(chunk)
            messages.append((chunk, b""))
        worker.send_all(messages)
        for (_, at, _), chunks in zip(readers, sent, strict=True):
            assert [(await at.next())[0] for _ in chunks] == chunks
        assert all(route.worker.heard_ns > 0 for route in routes)
        assert made.at.messages.empty()
        worker.send_all([(CHUNK, b""), (bytes([CHUNKS]), b"")])
        assert await made.at.next() == (worker_name, CHUNK, b"")
        assert await made.at.next() == (worker_name, bytes([CHUNKS]), b"")


async def test_a_connection_that_ends_is_known_at_both_ends(
    endpoint: str, router: Transport, dealer: Transport, guarded: bool
) -> None:
    async with side(endpoint, router, dealer, guarded) as made:
        link, _, name = await made.greeted()
        _, at, other = await made.greeted()
        link.close()
        assert await asyncio.wait_for(made.at.lost.get(), 10) == name
        assert not made.link.send(name, BEATING)
        assert made.link.send(other, BEATING)
        assert await at.next() == (BEATING, b"")
        await made.link.close()
        assert await at.next() == "down"


async def test_a_dealer_finds_the_next_router(ipc: str, router: Transport, dealer: Transport) -> None:
    async with side(ipc, router, dealer) as made:
        link, at, _ = await made.greeted()
        made.made.clear()
    assert await at.next() == "down"
    async with side(ipc, router, dealer) as made:
        assert await at.next() == "up"
        link.send_all([(HELLO, b"")])
        assert (await made.at.next())[1] == HELLO
        link.close()
    assert link.counted()["connections"] == 2


async def test_a_reader_that_is_gone_is_told(ipc: str, router: Transport, dealer: Transport) -> None:
    async with side(ipc, router, dealer) as made:
        worker, _, name = await made.greeted()
        made.routes[name + CHUNK] = Route(RoutingId(b"\0gone"))
        worker.send_all([(CHUNK + b"text", b"")])
        assert await asyncio.wait_for(made.at.lost.get(), 10) == b"\0gone"


async def test_a_key_that_is_not_known_and_a_server_that_is_another(
    endpoint: str, router: Transport, dealer: Transport
) -> None:
    async with side(endpoint, router, dealer, guarded=True) as made:
        _, at = made.dealer(STRANGER)
        assert await at.next() is IncorrectKeyError
        assert made.logged[0] == {"reason": "the peer's key is not in the keyring", "count": 1}
        other, lost = made.dealer(KNOWN, STRANGER)
        assert await lost.next() is IncorrectKeyError
        assert "another key" in other.trouble
        assert made.logged[1]["reason"] == "the peer expects another controller's key"
        assert made.link.counted()["handshakes_failed"] >= 4
        await made.greeted()
        assert made.at.messages.empty()


async def test_ends_without_and_with_keys_do_not_meet(ipc: str, router: Transport, dealer: Transport) -> None:
    for guarded in (False, True):
        async with side(ipc, router, dealer, guarded) as made:
            made._guarded = not guarded
            link, at = made.dealer()
            made._guarded = guarded
            assert await at.next() is AuthenticationError
            assert link.trouble
            link.close()
            await made.greeted()


async def test_an_endpoint_has_one_controller(ipc: str, router: Transport, dealer: Transport) -> None:
    async with side(ipc, router, dealer) as first, side("tcp://127.0.0.1:*", router, dealer) as second:
        for taken in (first, second):
            with pytest.raises(EndpointInUseError):
                open_router(taken.link.endpoints, {}, AtRouter(), transport=dealer)
        await first.greeted()


def test_a_driver_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="quic"):
        choose("quic")
    monkeypatch.setenv("ZFABRIC_TRANSPORT", "loop")
    assert (choose(None), choose("libzmq")) == ("loop", "libzmq")
    monkeypatch.setenv("ZFABRIC_TRANSPORT", "quic")
    with pytest.raises(ConfigurationError, match="quic"):
        choose(None)


# ── peers that frame as they like ───────────────────────────────────────────────────────────────────────────────────


class Rogue:
    """A peer by hand, on a socket of its own."""

    def __init__(self, endpoint: str) -> None:
        if endpoint.startswith("ipc://"):
            self.wire = socket.socket(socket.AF_UNIX)
            self.wire.connect(endpoint.removeprefix("ipc://"))
        else:
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            self.wire = socket.create_connection((host, int(port)))
        self.wire.setblocking(False)

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self.wire, data)

    async def hello(self) -> None:
        await self.send(GREETING + DEALER_READY)
        loop, missing = asyncio.get_running_loop(), len(GREETING + ROUTER_READY)
        # libzmq asks who may connect before it says READY, and takes no message until then.
        while missing:
            missing -= len(await loop.sock_recv(self.wire, missing))
        await self.send(head(len(HELLO)) + HELLO)

    async def ended(self) -> bytes:
        """What comes until the connection is closed."""
        found = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limits.HANDSHAKE_MS / 1_000 + 5):
            with contextlib.suppress(ConnectionError):
                while data := await loop.sock_recv(self.wire, 65_536):
                    found += data
        return found


@pytest.fixture
def rogues() -> Iterator[list[Rogue]]:
    made: list[Rogue] = []
    yield made
    for rogue in made:
        rogue.wire.close()


async def test_wrong_numbers_of_frames_are_dropped_whole(endpoint: str, router: Transport, rogues: list[Rogue]) -> None:
    async with side(endpoint, router, router) as made:
        honest, _, _ = await made.greeted()
        rogue = Rogue(made.link.endpoints[0])
        rogues.append(rogue)
        await rogue.hello()
        name = (await made.at.next())[0]
        submit, beat = head(len(SUBMITTED), MORE) + SUBMITTED, head(len(BEATING), MORE) + BEATING
        wrong = [
            head(len(SUBMITTED)) + SUBMITTED,
            submit + head(0, MORE) + head(0),
            submit + head(1, MORE) + b"a" + head(1) + b"b",
            beat + head(len(BEATING)) + BEATING,
            head(0, MORE) + head(0),
            head(len(CHUNK), MORE) + CHUNK + head(0),
            beat * 5 + head(0),
        ]
        for frames in wrong:
            await rogue.send(frames)
        await rogue.send(submit + head(0))
        assert await made.at.next() == (name, SUBMITTED, b"")
        honest.send_all([(BEATING, b"")])
        assert (await made.at.next())[1] == BEATING
        assert made.link.counted()["malformed"] == len(wrong) == len(made.at.malformed)


@pytest.mark.parametrize(
    "attack",
    [
        b"\x02" + (limits.FRAME_BYTES_MAX + 1).to_bytes(8, "big"),
        b"\x02" + b"\x7f" + b"\xff" * 7,
        b"\x02" + b"\xff" * 8,
    ],
    ids=["one byte more", "the largest", "all bits"],
)
async def test_a_frame_that_is_too_large_ends_its_connection(
    ipc: str, router: Transport, rogues: list[Rogue], attack: bytes
) -> None:
    async with side(ipc, router, router) as made:
        honest, _, _ = await made.greeted()
        rogue = Rogue(ipc)
        rogues.append(rogue)
        await rogue.hello()
        name = (await made.at.next())[0]
        await rogue.send(attack)
        await rogue.ended()
        assert await asyncio.wait_for(made.at.lost.get(), 10) == name
        honest.send_all([(BEATING, b"")])
        assert (await made.at.next())[1] == BEATING


@pytest.mark.parametrize(
    "attack",
    [
        head(1, MORE) + b"a",
        head(0, MORE),
        bytes([BEAT | 0x80]),
        b"\x05\x00",
        command(b"PING", b"\0"),
        head(limits.CONTROL_BODY_BYTES_MAX, MORE) + bytes(limits.CONTROL_BODY_BYTES_MAX),
    ],
    ids=["endless frames", "endless empty frames", "reserved flags", "a command with MORE", "a cut command", "much"],
)
async def test_only_the_loop_bounds_messages_and_flags(ipc: str, rogues: list[Rogue], attack: bytes) -> None:
    """libzmq waits for the end of a message for ever, and looks at no reserved flag."""
    async with side(ipc, "loop", "loop") as made:
        honest, _, _ = await made.greeted()
        rogue = Rogue(ipc)
        rogues.append(rogue)
        await rogue.hello()
        name = (await made.at.next())[0]
        sending = asyncio.create_task(rogue.send(attack * 40))
        await rogue.ended()
        await sending
        assert await asyncio.wait_for(made.at.lost.get(), 10) == name
        assert made.link.counted()["protocol_errors"] == 1
        honest.send_all([(BEATING, b"")])
        assert (await made.at.next())[1] == BEATING
        assert made.at.messages.empty()


@pytest.mark.parametrize(
    "opening",
    [b"", b"\xff", GREETING[:40], GREETING, GREETING + DEALER_READY[:9]],
    ids=["silence", "a byte", "half a greeting", "a greeting", "half a READY"],
)
async def test_a_handshake_that_stops_is_ended_by_its_timer(
    ipc: str, router: Transport, rogues: list[Rogue], opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_MS", 200)
    async with side(ipc, router, router) as made:
        rogue = Rogue(ipc)
        rogues.append(rogue)
        await rogue.send(opening)
        assert (await rogue.ended())[:10] == GREETING[:10]
        assert made.at.messages.empty()
        await made.greeted()


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        b"\x16\x03\x01" + bytes(80),
        b"\xff" + bytes(8) + b"\x7f\x01" + bytes(53),
        GREETING.replace(b"NULL\0", b"PLAIN"),
        GREETING + head(3) + b"abc",
        GREETING + command(b"READY", b"\x05"),
    ],
    ids=["HTTP", "TLS", "ZMTP 1", "PLAIN", "a message first", "bad metadata"],
)
async def test_what_is_no_handshake_is_ended(
    ipc: str, router: Transport, rogues: list[Rogue], opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_MS", 500)
    async with side(ipc, router, router) as made:
        rogue = Rogue(ipc)
        rogues.append(rogue)
        await rogue.send(opening)
        await rogue.ended()
        await made.greeted()
        assert made.at.messages.empty()


async def test_random_bytes_after_a_right_beginning_stop_nobody(
    ipc: str, router: Transport, rogues: list[Rogue]
) -> None:
    rng = random.Random(5)
    right = GREETING + DEALER_READY + head(len(BEATING)) + BEATING
    async with side(ipc, router, router) as made:
        honest, _, name = await made.greeted()
        for _ in range(40):
            rogue = Rogue(ipc)
            rogues.append(rogue)
            await rogue.send(right[: rng.randrange(len(right))] + rng.randbytes(rng.randrange(200)))
        await asyncio.sleep(0)
        honest.send_all([(SUBMITTED, b"still here")])
        while (message := await made.at.next())[0] != name:
            pass
        assert message[1:] == (SUBMITTED, b"still here")
