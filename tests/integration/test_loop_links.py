"""The event loop's own links against pyzmq's plain sockets: what they say is ZMTP to libzmq."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
import zmq
import zmq.asyncio

from tests.unit.test_zmtp import GREETING
from zfabric import AsyncClient, limits
from zfabric.errors import ConfigurationError, EndpointInUseError, FabricError
from zfabric.ids import RoutingId
from zfabric.transport.curve import ControllerKeys, Credentials, KeyPair
from zfabric.transport.ipc import check_listener, peer_uid
from zfabric.transport.loop_dealer import LoopDealer
from zfabric.transport.loop_router import LoopRouter
from zfabric.transport.paths import is_dead
from zfabric.wire.kinds import BEAT, CHUNKS, CLIENT_HELLO, DISPATCH, SUBMIT
from zfabric.zmtp.frames import command
from zfabric.zmtp.metadata import own_properties

BEATING = bytes([BEAT]) + b"\x91\x07"
HELLO = bytes([CLIENT_HELLO]) + b"hello"
SUBMITTED = bytes([SUBMIT]) + b"envelope"
DISPATCHED = bytes([DISPATCH]) + b"envelope"


class Worker:
    heard_ns = 0


class Route:
    def __init__(self, client: RoutingId) -> None:
        self.client = client
        self.worker = Worker()


class AtRouter:
    """Who drives a router's link in a test."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[tuple[RoutingId, bytes, bytes]] = asyncio.Queue()
        self.lost: asyncio.Queue[RoutingId] = asyncio.Queue()
        self.malformed: list[tuple[RoutingId, bytes]] = []
        self.idle = 0

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None:
        self.messages.put_nowait((sender, header, bytes(body)))

    def link_malformed(self, sender: RoutingId, header: bytes) -> None:
        self.malformed.append((sender, header))

    def link_lost(self, peer: RoutingId) -> None:
        self.lost.put_nowait(peer)

    def link_idle(self) -> None:
        self.idle += 1

    async def next(self) -> tuple[RoutingId, bytes, bytes]:
        return await asyncio.wait_for(self.messages.get(), 10)


class AtDealer:
    """Who drives a dealer's link in a test."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Any] = asyncio.Queue()

    def link_up(self) -> None:
        self.events.put_nowait("up")

    def link_down(self) -> None:
        self.events.put_nowait("down")

    def link_denied(self, error: FabricError) -> None:
        self.events.put_nowait(type(error))

    def link_message(self, header: bytes, body: bytes) -> None:
        self.events.put_nowait((header, bytes(body)))

    def link_idle(self) -> None:
        pass

    async def next(self) -> Any:
        return await asyncio.wait_for(self.events.get(), 10)


def pair_of_keys() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


@contextlib.asynccontextmanager
async def sockets() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


@contextlib.asynccontextmanager
async def router_at(endpoint: str, keys: ControllerKeys | None = None) -> AsyncIterator[tuple[LoopRouter, AtRouter]]:
    receiver = AtRouter()
    link = LoopRouter((endpoint,), {}, receiver, keys)
    try:
        yield link, receiver
    finally:
        await link.close()


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_dealer_and_libzmqs_router(endpoint: str, guarded: bool) -> None:
    ours, theirs = pair_of_keys(), pair_of_keys()
    async with sockets() as context:
        router = context.socket(zmq.ROUTER)
        router.sndhwm = 0
        if guarded:
            router.curve_server, router.curve_secretkey, router.curve_publickey = True, theirs.secret, theirs.public
        router.bind(endpoint)
        at = AtDealer()
        bound = router.getsockopt_string(zmq.LAST_ENDPOINT)
        link = LoopDealer(bound, at, random.Random(1), Credentials(ours, theirs.public) if guarded else None)
        assert await at.next() == "up"
        body = random.Random(2).randbytes(3_000_000)
        link.send_all([(HELLO, b""), (SUBMITTED, body), (SUBMITTED, b"")])
        name, *frames = await router.recv_multipart()
        assert frames == [HELLO]
        assert (await router.recv_multipart())[1:] == [SUBMITTED, body]
        assert (await router.recv_multipart())[1:] == [SUBMITTED, b""]
        await router.send_multipart([name, DISPATCHED, body])
        for _ in range(1_000):
            await router.send_multipart([name, BEATING])
        assert await at.next() == (DISPATCHED, body)
        assert [await at.next() for _ in range(1_000)] == [(BEATING, b"")] * 1_000
        link.close()
        link.close()
        assert not link.connected


async def test_a_dealer_comes_back_to_a_router_that_was_away(ipc: str) -> None:
    at = AtDealer()
    link = LoopDealer(ipc, at, random.Random(1))
    async with sockets() as context:
        for _ in range(3):
            router = context.socket(zmq.ROUTER)
            router.bind(ipc)
            assert await at.next() == "up"
            router.close(linger=0)
            assert await at.next() == "down"
            assert not link.connected
            link.send_all([(HELLO, b"")])
    assert link.counted()["connections"] == 3
    link.close()


@pytest.mark.parametrize("guarded", [False, True])
async def test_a_router_and_libzmqs_dealers(endpoint: str, guarded: bool) -> None:
    ours = pair_of_keys()
    theirs = [pair_of_keys() for _ in range(2)]
    keys = ControllerKeys(ours, lambda key: key in [pair.public for pair in theirs]) if guarded else None
    async with sockets() as context, router_at(endpoint, keys) as (link, at):
        dealers = []
        for pair in theirs:
            dealer = context.socket(zmq.DEALER)
            if guarded:
                dealer.curve_serverkey = ours.public
                dealer.curve_secretkey, dealer.curve_publickey = pair.secret, pair.public
            dealer.connect(link.endpoints[0])
            dealers.append(dealer)
        names = []
        for dealer, pair in zip(dealers, theirs, strict=True):
            await dealer.send(HELLO)
            name, header, body = await at.next()
            assert (header, body, len(name)) == (HELLO, b"", 5)
            assert link.key_of(name) == (pair.public if guarded else b"")
            names.append(name)
        body = random.Random(2).randbytes(3_000_000)
        await dealers[0].send_multipart([SUBMITTED, body])
        assert await at.next() == (names[0], SUBMITTED, body)
        assert link.send(names[1], DISPATCHED, body)
        assert link.send(names[1], BEATING)
        assert await dealers[1].recv_multipart() == [DISPATCHED, body]
        assert await dealers[1].recv_multipart() == [BEATING]
        await relayed(link, names, dealers)
        dealers[0].close(linger=0)
        assert await asyncio.wait_for(at.lost.get(), 10) == names[0]
        assert not link.send(names[0], BEATING)
        assert link.counted()["connections"] == 1


async def relayed(link: LoopRouter, names: list[RoutingId], dealers: list[Any]) -> None:
    """Chunks of all sizes go from the second dealer to the first, in order, and never to the receiver."""
    route = Route(names[0])
    chunk = bytes([CHUNKS]) + b"\0\0\0\x09"
    link.routes = {names[1] + chunk: route}
    sizes = [0, 1, 200, 250, 251, 252, 4_000, 5_000, 70_000, 400_000] * 3
    chunks = [chunk + index.to_bytes(1, "big") * size for index, size in enumerate(sizes)]
    for made in chunks:
        await dealers[1].send(made)
    assert [await asyncio.wait_for(dealers[0].recv(), 10) for _ in chunks] == chunks
    assert route.worker.heard_ns > 0


async def test_a_chunk_without_a_route_is_handed_over(ipc: str) -> None:
    async with sockets() as context, router_at(ipc) as (link, at):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(ipc)
        for chunk in (bytes([CHUNKS]) + b"\0\0\0\x01text", bytes([CHUNKS]), b"", bytes([CHUNKS]) + b"\0\0"):
            await dealer.send(chunk)
            assert (await at.next())[1:] == (chunk, b"")
        assert link.counted()["malformed"] == 0


async def test_a_chunk_whose_reader_is_gone_tells_so(ipc: str) -> None:
    async with sockets() as context, router_at(ipc) as (link, at):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(ipc)
        await dealer.send(HELLO)
        name, _, _ = await at.next()
        nobody = RoutingId(b"\0gone")
        link.routes = {name + bytes([CHUNKS]) + b"\0\0\0\x01": Route(nobody)}
        await dealer.send(bytes([CHUNKS]) + b"\0\0\0\x01text")
        assert await asyncio.wait_for(at.lost.get(), 10) == nobody


async def test_localhost_is_all_that_it_means_here_and_a_wildcard_is_one_port() -> None:
    async with sockets() as context, router_at("tcp://localhost:*") as (link, at):
        port = int(link.endpoints[0].rpartition(":")[2])
        found = {address[0] for *_, address in socket.getaddrinfo("localhost", port, type=socket.SOCK_STREAM)}
        for address in (f"[{host}]" if ":" in str(host) else host for host in found):
            dealer = context.socket(zmq.DEALER)
            dealer.ipv6 = True
            dealer.connect(f"tcp://{address}:{port}")
            await dealer.send(HELLO)
            assert (await at.next())[1] == HELLO
            dealer.close(linger=0)


async def test_ipv6() -> None:
    async with router_at("tcp://[::1]:*") as (link, at):
        end = AtDealer()
        dealer = LoopDealer(link.endpoints[0], end, random.Random(1))
        assert await end.next() == "up"
        dealer.send_all([(HELLO, b"")])
        assert (await at.next())[1] == HELLO
        dealer.close()


async def test_an_endpoint_that_is_taken_or_unknown(ipc: str) -> None:
    async with router_at("tcp://127.0.0.1:*") as (link, _), router_at(ipc):
        for endpoint in (link.endpoints[0], ipc):
            with pytest.raises(EndpointInUseError):
                LoopRouter((endpoint,), {}, AtRouter())
    for endpoint in ("inproc://a", "tcp://192.0.2.1:*", "ipc:///tmp/c.sock"):
        with pytest.raises(ConfigurationError):
            LoopRouter((endpoint,), {}, AtRouter())
    with pytest.raises(ConfigurationError):
        LoopDealer("inproc://a", AtDealer(), random.Random(1))


async def test_a_reader_that_stops_is_cut_at_its_bound_and_others_are_not(ipc: str) -> None:
    async with router_at(ipc) as (link, at):
        quick, slow = [await asyncio.open_unix_connection(ipc.removeprefix("ipc://")) for _ in range(2)]
        names = []
        for reader, writer in (quick, slow):
            await shake_hands(reader, writer)
            writer.write(bytes([0, len(HELLO)]) + HELLO)
            names.append((await at.next())[0])
        slow[1].transport.pause_reading()  # type: ignore[attr-defined]
        answer = bytes([BEAT]) + bytes(50_000)
        sent = 0
        while link.send(names[1], answer):
            sent += len(answer)
            assert sent < 4 * limits.PARKED_BYTES_MAX
            await asyncio.sleep(0)
        assert sent >= limits.PARKED_BYTES_MAX
        assert link.counted()["overflowed"] == 1
        assert link.send(names[0], BEATING)
        assert (await quick[0].readexactly(2 + len(BEATING)))[2:] == BEATING
        for _, writer in (quick, slow):
            writer.close()


async def shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A DEALER by hand."""
    writer.write(GREETING)
    writer.write(command(b"READY", own_properties(b"DEALER")))
    await reader.readexactly(64 + 43)


async def test_large_bodies_are_not_held_against_a_reader(ipc: str) -> None:
    """Several prompts of many megabytes wait for a worker that has asked for them."""
    async with router_at(ipc) as (link, at):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        writer.write(bytes([0, len(HELLO)]) + HELLO)
        name = (await at.next())[0]
        body = bytes(9 << 20)
        for _ in range(5):
            assert link.send(name, DISPATCHED, body)
            await asyncio.sleep(0)
        for _ in range(5):
            await reader.readexactly(2 + len(DISPATCHED) + 9 + len(body))
        writer.close()


async def test_a_peer_whose_kernel_answers_for_it_is_busy_and_not_dead(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose interpreter is held: it answers no PING, and stays; in the end nobody is waited for."""
    monkeypatch.setattr(limits, "ZMTP_PING_MS", 25)
    # A kernel takes some 40 ms to acknowledge what nobody reads.
    monkeypatch.setattr(limits, "ZMTP_TIMEOUT_MS", 200)
    async with router_at(endpoint) as (link, at), busy(link.endpoints[0]) as reader:
        while not link.peers:
            await asyncio.sleep(0)
        for _ in range(12):
            await reader.readuntil(b"\x04PING\0\0")
        assert at.lost.empty()
        monkeypatch.setattr(limits, "SILENCE_MS", 60)
        assert len(await asyncio.wait_for(at.lost.get(), 10)) == 5
        assert link.counted()["connections"] == 0


@contextlib.asynccontextmanager
async def busy(endpoint: str) -> AsyncIterator[asyncio.StreamReader]:
    """A DEALER by hand that says nothing more when it is connected."""
    if endpoint.startswith("ipc://"):
        reader, writer = await asyncio.open_unix_connection(endpoint.removeprefix("ipc://"))
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        await shake_hands(reader, writer)
        yield reader
    finally:
        writer.close()


@pytest.mark.parametrize("told", [True, None])
async def test_a_path_that_has_died_is_given_up_as_soon_as_the_kernel_knows(
    ipc: str, told: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where no kernel tells, when the peer is silent for as long."""
    monkeypatch.setattr(limits, "ZMTP_PING_MS", 5)
    monkeypatch.setattr(limits, "ZMTP_TIMEOUT_MS", 10)
    monkeypatch.setattr("zfabric.transport.paths.is_dead", lambda connected, silence_ms: told)
    async with router_at(ipc) as (_, at), busy(ipc):
        assert len(await asyncio.wait_for(at.lost.get(), 10)) == 5


def test_what_the_kernel_tells_of_a_path() -> None:
    """Of a live one that nobody reads it tells no death, however much waits in it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        near.sendall(b"x")
        assert is_dead(near, 60_000) is False
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 20))
        assert is_dead(near, 60_000) is False
        far.close()
    assert is_dead(near, 0) is None
    one, two = socket.socketpair()
    with one, two:
        assert is_dead(one, 0) is False
    assert is_dead(None, 0) is None


async def test_a_silent_path_is_given_up_at_both_ends(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ZMTP_PING_MS", 20)
    monkeypatch.setattr(limits, "SILENCE_MS", 60)
    async with router_at(ipc) as (_, at):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        # It says nothing more: it is pinged, and cut.
        assert b"\x04PING" in await asyncio.wait_for(reader.read(), 10)
        assert len(await asyncio.wait_for(at.lost.get(), 10)) == 5
        writer.close()
    silent = await asyncio.start_unix_server(shake_hands_as_router, ipc.removeprefix("ipc://"))
    end = AtDealer()
    link = LoopDealer(ipc, end, random.Random(1))
    assert [await end.next() for _ in range(2)] == ["up", "down"]
    link.close()
    silent.close()
    await silent.wait_closed()


async def shake_hands_as_router(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    writer.write(command(b"READY", own_properties(b"ROUTER")))
    await reader.read()
    writer.close()


async def test_two_links_that_only_beat_stay_connected(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loop_router", "loop_dealer", "loop_wire"):
        monkeypatch.setattr(f"zfabric.transport.{module}.limits.ZMTP_PING_MS", 20)
        monkeypatch.setattr(f"zfabric.transport.{module}.limits.ZMTP_TIMEOUT_MS", 200)
    async with router_at(ipc) as (router, at):
        end = AtDealer()
        link = LoopDealer(ipc, end, random.Random(1))
        assert await end.next() == "up"
        await asyncio.sleep(0.6)
        assert link.connected
        assert router.counted()["connections"] == 1
        assert at.lost.empty()
        assert end.events.empty()
        link.close()


async def test_accepting_pauses_when_files_run_out_and_goes_on(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ACCEPT_PAUSE_MS", 20)
    told: list[dict[str, object]] = []
    at = AtRouter()
    link = LoopRouter((ipc,), {}, at, log=lambda event, **fields: told.append({"event": event, **fields}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = ipc.removeprefix("ipc://")
    first = await asyncio.open_unix_connection(path)
    await shake_hands(*first)
    second = socket.socket(socket.AF_UNIX)
    try:
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
        holes = [os.dup(0) for _ in range(_free_below(used + 1))]
        second.connect(path)
        while link.counted()["accepting_paused"] < 3:
            await asyncio.sleep(0.005)
        # Who is there already does not notice.
        first[1].write(bytes([0, len(HELLO)]) + HELLO)
        assert (await at.next())[1] == HELLO
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for hole in holes:
            os.close(hole)
    assert told[0]["event"] == "accepting_paused"
    assert "Too many open files" in str(told[0]["error"])
    second.setblocking(False)
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(second, 10), 10) == GREETING[:10]
    second.close()
    first[1].close()
    await link.close()


def _free_below(limit: int) -> int:
    """How many descriptors a process may still open."""
    return limit - len({int(name) for name in os.listdir("/proc/self/fd") if int(name) < limit}) + 1


@pytest.mark.parametrize("uid", [0, os.geteuid(), 54_321])
async def test_a_unix_socket_is_for_its_own_user_and_root(ipc: str, uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.transport.loop_accept.peer_uid", lambda connected: uid)
    async with router_at(ipc) as (link, _):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        allowed = uid in (0, os.geteuid())
        assert bool(await reader.read(10)) == allowed
        assert link.counted()["handshakes_refused"] == (not allowed)
        writer.close()


def test_the_system_tells_the_uid_of_a_unix_peer() -> None:
    one, two = socket.socketpair()
    with one, two:
        assert peer_uid(one) == os.geteuid()
        check_listener(one, "/c")


@pytest.mark.parametrize("uid", [None, 0, os.geteuid(), 54_321])
async def test_a_dealer_speaks_to_its_own_user_and_root(
    ipc: str, uid: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing to anybody else, but why; where no kernel tells, the directory has to do."""
    monkeypatch.setattr("zfabric.transport.ipc.peer_uid", lambda connected: uid)
    path, end = ipc.removeprefix("ipc://"), AtDealer()
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.put_nowait(await reader.read(1))
        writer.close()

    server = await asyncio.start_unix_server(listening, path)
    link = LoopDealer(ipc, end, random.Random(1))
    if uid == 54_321:
        assert await end.next() is ConfigurationError
        own = os.geteuid()
        assert link.trouble.startswith(
            f"uid 54321 listens at {path}, neither this user (uid {own}) nor root: start the"
        )
        assert await asyncio.wait_for(heard.get(), 10) == b""
    else:
        assert await asyncio.wait_for(heard.get(), 10) == GREETING[:1]
    link.close()
    server.close()
    await server.wait_closed()


#: Binds as root, and listens as somebody else, whose socket it is to the kernel. Says what it hears.
IMPOSTOR = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.setuid(54321)
listener.listen()
print("ready", flush=True)
print(listener.accept()[0].recv(100), flush=True)
"""


@contextlib.asynccontextmanager
async def impostor(endpoint: str) -> AsyncIterator[asyncio.StreamReader]:
    """Another user who listens where a controller should. What it prints is there to be read."""
    path = endpoint.removeprefix("ipc://")
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", IMPOSTOR, path, stdout=pipe)
    assert child.stdout is not None
    try:
        assert await child.stdout.readline() == b"ready\n"
        yield child.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can let another user listen in its directory")


@as_root
async def test_another_user_who_listens_in_ones_own_directory_is_told_apart(ipc: str) -> None:
    async with impostor(ipc) as heard:
        end = AtDealer()
        link = LoopDealer(ipc, end, random.Random(1))
        assert await end.next() is ConfigurationError
        assert link.trouble.startswith("uid 54321 listens at ")
        assert not link.connected
        link.close()
        assert await asyncio.wait_for(heard.readline(), 10) == b"b''\n"


@as_root
async def test_a_client_is_told_who_listens_in_place_of_its_controller(ipc: str) -> None:
    async with impostor(ipc), AsyncClient(ipc, transport="loop") as client:
        with pytest.raises(ConfigurationError, match="uid 54321 listens at") as told:
            await client.status()
    assert told.value.details["listener"] == 54_321
    assert not told.value.retryable


async def test_a_peers_time_to_live_is_kept(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PING asks to be cut off after so much silence: earlier than the link would by itself."""
    for module in ("loop_router", "loop_wire"):
        monkeypatch.setattr(f"zfabric.transport.{module}.limits.ZMTP_PING_MS", 50)
        monkeypatch.setattr(f"zfabric.transport.{module}.limits.ZMTP_TIMEOUT_MS", 60_000)
    async with router_at(ipc) as (_, at):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        writer.write(command(b"PING", b"\0\x01" + b"me"))
        assert command(b"PONG", b"me") in await asyncio.wait_for(reader.read(), 10)
        assert len(await asyncio.wait_for(at.lost.get(), 10)) == 5
        writer.close()


async def test_what_waits_for_a_peer_is_visible(ipc: str) -> None:
    async with router_at(ipc) as (link, at):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        writer.write(bytes([0, len(HELLO)]) + HELLO)
        name = (await at.next())[0]
        assert (link.buffered(name), link.counted()["buffered_bytes"]) == (0, 0)
        assert link.send(name, DISPATCHED, bytes(5_000_000))
        assert link.buffered(name) > 1_000_000
        assert link.counted()["buffered_bytes"] == link.buffered(name)
        await reader.readexactly(5_000_000)
        writer.close()


async def test_a_peer_that_has_said_no_hello_has_less_room(ipc: str) -> None:
    async with router_at(ipc) as (link, at):
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        writer.write(bytes([0, len(BEATING)]) + BEATING)
        name = (await at.next())[0]
        link.is_known = lambda peer: peer != name
        answer = bytes([BEAT]) + bytes(50_000)
        sent = 0
        while link.send(name, answer):
            sent += len(answer)
            assert sent < limits.PARKED_BYTES_MAX
            link.flush()
        assert sent >= limits.PARKED_STRANGER_BYTES_MAX
        writer.close()


@pytest.mark.parametrize("said", ["nothing", "a refused HELLO", "a HELLO"])
async def test_only_who_has_a_session_may_announce_what_requests_have(ipc: str, said: str) -> None:
    async with router_at(ipc) as (link, at):
        link.is_known = lambda _: said == "a HELLO"
        reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
        await shake_hands(reader, writer)
        if said != "nothing":
            hello = bytes([CLIENT_HELLO]) + b"\x90"
            writer.write(bytes([0, len(hello)]) + hello)
            await at.next()
        size = limits.CONTROL_BODY_BYTES_MAX + 1
        body = bytes([BEAT]) + bytes(size - 1)
        writer.write(b"\x02" + size.to_bytes(8, "big") + body)
        if said == "a HELLO":
            assert len((await at.next())[1]) == size
        else:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            assert at.messages.empty()
        writer.close()


class Written(asyncio.Transport):
    """Notes each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


async def test_reads_of_chunks_that_follow_closely_are_written_together(
    ipc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that comes alone is written before anything else is looked at."""
    now = [1_000_000_000]
    monkeypatch.setattr("zfabric.transport.loop_router.monotonic_ns", lambda: now[0])
    async with router_at(ipc) as (link, at):
        names, writers = [], []
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
            await shake_hands(reader, writer)
            writer.write(bytes([0, len(HELLO)]) + HELLO)
            names.append((await at.next())[0])
            writers.append(writer)
        written = Written()
        target, sender = (link.peers[name] for name in names)
        kept, target._transport = target._transport, written
        header = bytes([CHUNKS]) + b"\0\0\0\x09"
        link.routes = {names[1] + header: Route(names[0])}

        def chunk(number: int) -> bytes:
            text = header + b"%d" % number
            return bytes([0, len(text)]) + text

        sender.data_received(chunk(0))
        assert written.writes == [chunk(0)]
        for number in (1, 2, 3):
            now[0] += limits.READS_TOGETHER_US * 1_000
            sender.data_received(chunk(number))
        assert written.writes == [chunk(0)]
        await asyncio.sleep(0)
        assert written.writes == [chunk(0), chunk(1) + chunk(2) + chunk(3)]
        now[0] += limits.READS_TOGETHER_US * 1_000 + 1
        sender.data_received(chunk(4))
        assert written.writes[2:] == [chunk(4)]
        # However many connections there are, the first does not wait for all of them.
        for number in range(limits.READS_TOGETHER_MAX + 2):
            sender.data_received(chunk(number))
        assert written.writes[3:] == [b"".join(map(chunk, range(limits.READS_TOGETHER_MAX + 1)))]
        await asyncio.sleep(0)
        assert written.writes[4:] == [chunk(limits.READS_TOGETHER_MAX + 1)]
        target._transport = kept
        for writer in writers:
            writer.close()


class Spun:
    """Counts work in a spinner's place."""

    made: ClassVar[list[Spun]] = []

    def __init__(self, loop: asyncio.AbstractEventLoop, spin_us: int) -> None:
        self.spin_us, self.count, self.closed = spin_us, 0, False
        self.made.append(self)

    def worked(self) -> None:
        self.count += 1

    def close(self) -> None:
        self.closed = True


async def test_links_spin_after_what_they_read_and_a_dealer_after_what_it_sends(
    ipc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spun, "made", [])
    for module in ("loop_router", "loop_dealer"):
        monkeypatch.setattr(f"zfabric.transport.{module}.Spinner", Spun)
    at, end = AtRouter(), AtDealer()
    router = LoopRouter((ipc,), {}, at, spin_us=70)
    dealer = LoopDealer(ipc, end, random.Random(1), spin_us=80)
    at_router, at_dealer = Spun.made
    assert (at_router.spin_us, at_dealer.spin_us) == (70, 80)
    assert await end.next() == "up"
    heard, answered = at_router.count, at_dealer.count
    dealer.send_all([(HELLO, b"")])
    assert at_dealer.count == answered + 1
    name = (await at.next())[0]
    assert at_router.count > heard
    router.send(name, BEATING)
    assert await end.next() == (BEATING, b"")
    assert at_dealer.count > answered + 1
    dealer.close()
    await router.close()
    assert at_router.closed
    assert at_dealer.closed


async def test_links_have_no_spinner_unless_they_are_told_to(ipc: str) -> None:
    async with router_at(ipc) as (router, _):
        dealer = LoopDealer(ipc, AtDealer(), random.Random(1))
        assert router.spinner is None
        assert dealer.spinner is None
        dealer.close()
