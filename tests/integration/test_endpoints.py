"""First contact: where a controller listens, where it is looked for, and what a wrong endpoint leads to."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fabric import Fabric, Process, fabric, processes
from zfabric import AsyncClient, Client, Credentials
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.errors import ConfigurationError, ConnectionLostError, EndpointInUseError, FabricError
from zfabric.ids import RoutingId
from zfabric.limits import IPC_PATH_LENGTH_MAX
from zfabric.transport.curve import ControllerKeys, KeyPair
from zfabric.transport.endpoints import check_endpoint, default_endpoint, is_local, parse_endpoint
from zfabric.transport.links import TRANSPORTS, DealerDriver, RouterDriver, Transport, open_dealer, open_router
from zfabric.worker.config import WorkerConfig

ROOT = Path(__file__).resolve().parents[2]
FOUR, SIX = "127.0.0.1", "::1"
#: An address for documentation (RFC 5737): nobody's.
NOBODYS = "192.0.2.1"

#: Wrong for everybody.
MALFORMED = [
    "", " ", "tcp", "tcp:", "tcp://", "tcp://host", "tcp://host:", "tcp://:9000", "tcp://host:99999", "tcp://host:65536",
    "tcp://host:-1", "tcp://host:+5", "tcp://host:0x50", "tcp://host: 80", "tcp://host:80 ", " tcp://host:80", "tcp://host:80/",
    "tcp://host:80/path", "tcp://host/:80", "tcp://ho st:80", "tcp://host\n:80", "tcp://host:80\n", "tcp://h\0st:80",
    "tcp://user@host:80", "tcp://host:80?x", "tcp://host:80#x", "tcp://a;b:80", "tcp://1.2.3.4:0;host:80", "tcp://-host:80",
    "tcp://host..name:80", "tcp://" + "h" * 64 + ":80", "tcp://" + "host." * 60 + "x:80", "tcp://hôst:80", "tcp://host:٨٠",
    "tcp://::1:80", "tcp://[::1:80", "tcp://::1]:80", "tcp://[::1]", "tcp://[::1]80", "tcp://[]:80", "tcp://[host]:80",
    "tcp://[127.0.0.1]:80", "tcp://[::1]]:80", "tcp://[1::2::3]:80", "tcp://256.1.1.1:80", "tcp://1.2.3:80", "tcp://1:80",
    "tcp://1.2.3.4.5:80", "TCP://host:80", "http://host:80", "udp://host:80", "inproc://name", "pgm://x;y:1", "ws://host:80",
    "tcp:/host:80", "tcp//host:80", "ipc", "ipc:", "ipc://", "ipc://*", "ipc://@abstract", "ipc:///a\0b", "ipc:///tmp/\udc80.sock",
    "ipc:///tmp/", "ipc:///tmp", "ipc://.", "ipc:///" + "x" * 108, "ipc:///" + "ü" * 60, "unix:///tmp/x", "/tmp/x.sock",
    "file", "file://", "file://relative", "file:///tmp/", "file:///a\0b", "file://host/",
]  # fmt: skip
#: Where one can listen, but not connect to.
FOR_LISTENERS = ["tcp://*:80", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://host:0", "tcp://[::]:*"]
WELL_FORMED = [
    "tcp://host:1", "tcp://host:65535", "tcp://host.example:80", "tcp://host.example.:80", "tcp://my_host-2:80",
    "tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://[fe80::1%1]:80", "tcp://localhost:80", "tcp://xn--hst-sna:80",
    "ipc:///tmp/x.sock", "ipc://relative.sock", "ipc:///tmp/with space and ü", "ipc:///" + "x" * (IPC_PATH_LENGTH_MAX - 1),
]  # fmt: skip


def files() -> int:
    gc.collect()
    return psutil.Process().num_fds()


class Nobody:
    """Takes what a link tells."""

    def link_up(self) -> None: ...
    def link_down(self) -> None: ...
    def link_denied(self, error: FabricError) -> None: ...
    def link_message(self, header: bytes, body: bytes) -> None: ...
    def link_idle(self) -> None: ...


class NobodyElse:
    """Takes what a controller's link tells."""

    def link_message(self, sender: RoutingId, header: bytes, body: bytes) -> None: ...
    def link_malformed(self, sender: RoutingId, header: bytes) -> None: ...
    def link_lost(self, peer: RoutingId) -> None: ...
    def link_idle(self) -> None: ...


def _dealer(endpoint: str, credentials: Credentials | None = None, transport: Transport | None = None) -> DealerDriver:
    return open_dealer(endpoint, Nobody(), random.Random(1), credentials, transport)


def _router(*endpoints: str, keys: ControllerKeys | None = None, transport: Transport | None = None) -> RouterDriver:
    return open_router(endpoints, {}, NobodyElse(), keys=keys, transport=transport)


@pytest.mark.parametrize("endpoint", MALFORMED)
async def test_what_is_malformed_is_said_at_once_and_everywhere(endpoint: str) -> None:
    """By the error that all wrong settings have, and nothing is left open."""
    makers: list[Callable[[], Any]] = [
        lambda: ControllerConfig(endpoints=(endpoint,), public=True),
        lambda: WorkerConfig(endpoint=endpoint),
        lambda: check_endpoint(endpoint),
    ]
    for transport in TRANSPORTS:
        makers += [
            partial(_router, "tcp://127.0.0.1:*", endpoint, transport=transport),
            partial(_dealer, endpoint, transport=transport),
        ]
    if endpoint:
        makers += [lambda: AsyncClient(endpoint), lambda: Client(endpoint)]
    before = files()
    for make in makers:
        with pytest.raises(ConfigurationError, match="endpoint") as caught:
            make()
        assert caught.value.message.isprintable()
        caught.value.__traceback__ = None
    assert files() == before


@pytest.mark.parametrize("endpoint", [None, 5, b"tcp://127.0.0.1:1", Path("/tmp/x")])
def test_what_is_no_text_is_no_endpoint(endpoint: Any) -> None:
    with pytest.raises(ConfigurationError, match="no text"):
        check_endpoint(endpoint)


def test_one_endpoint_is_no_list_of_them() -> None:
    endpoint: Any = "tcp://127.0.0.1:1"
    with pytest.raises(ConfigurationError, match="must be a tuple"):
        ControllerConfig(endpoints=endpoint)


@pytest.mark.parametrize("endpoint", FOR_LISTENERS)
def test_only_who_listens_may_leave_something_open(endpoint: str) -> None:
    assert check_endpoint(endpoint, listens=True) == endpoint
    with pytest.raises(ConfigurationError):
        check_endpoint(endpoint)
    with pytest.raises(ConfigurationError):
        WorkerConfig(endpoint=endpoint)


@pytest.mark.parametrize("endpoint", WELL_FORMED)
def test_what_is_well_formed_is_taken(endpoint: str) -> None:
    assert check_endpoint(endpoint) == check_endpoint(endpoint, listens=True) == endpoint


def test_only_who_connects_may_be_given_a_file() -> None:
    endpoint = "file:///run/zfabric/endpoint"
    assert check_endpoint(endpoint) == WorkerConfig(endpoint=endpoint).endpoint == endpoint
    with pytest.raises(ConfigurationError, match="only who connects"):
        ControllerConfig(endpoints=(endpoint,))


def test_an_interface_is_no_place_to_connect_to() -> None:
    names = [name for _, name in socket.if_nameindex()]
    endpoint = f"tcp://{names[0]}:80"
    assert not parse_endpoint(endpoint, listens=True).literal
    with pytest.raises(ConfigurationError, match="network interface"):
        check_endpoint(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("ipc:///tmp/x.sock", True), ("tcp://127.0.0.1:1", True), ("tcp://127.9.9.9:1", True), ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True), ("tcp://LocalHost.:1", True), ("tcp://*:1", False), ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False), ("tcp://127.example.com:1", False), ("tcp://localhost.example:1", False),
        ("tcp://10.0.0.1:1", False),
    ],
)  # fmt: skip
def test_what_other_hosts_can_reach_has_to_be_asked_for(endpoint: str, local: bool) -> None:
    assert is_local(endpoint) is local
    if not local:
        with pytest.raises(ConfigurationError, match="set public"):
            ControllerConfig(endpoints=(endpoint,))


@pytest.mark.usefixtures("transport")
async def test_a_link_that_cannot_be_made_leaves_nothing_open(run_directory: Path) -> None:
    """Whatever the reason, and however much was made before it was found."""
    wrong, taken, shared = run_directory / "file", run_directory / "taken", run_directory / "shared"
    wrong.write_text("precious")
    shared.mkdir(mode=0o755)
    holder = _router(f"ipc://{taken}", "tcp://127.0.0.1:*")
    no_key = KeyPair(b"short", b"short")
    good = ("tcp://127.0.0.1:*", f"ipc://{run_directory}/good")
    before = files()
    makers: list[tuple[type[FabricError], Callable[[], Any]]] = [
        (EndpointInUseError, lambda: _router(*good, holder.endpoints[1])),
        (EndpointInUseError, lambda: _router(*good, f"ipc://{taken}")),
        (ConfigurationError, lambda: _router(*good, f"ipc://{shared}/c")),
        (ConfigurationError, lambda: _router(*good, f"ipc://{wrong}")),
        (ConfigurationError, lambda: _router(*good, f"ipc://{wrong}/below")),
        (ConfigurationError, lambda: _router(*good, f"tcp://{NOBODYS}:*")),
        (ConfigurationError, lambda: _router(*good, "tcp://no-such-name.invalid:*")),
        (ConfigurationError, lambda: _router(*good, keys=ControllerKeys(no_key, lambda _: True))),
        (ConfigurationError, lambda: _dealer(f"ipc://{taken}", Credentials(no_key, b"short"))),
        (ConfigurationError, lambda: _dealer(f"ipc://{wrong}")),
        (ConfigurationError, lambda: _dealer(f"ipc://{wrong}/below")),
    ]
    for kind, make in makers:
        for _ in range(3):
            with pytest.raises(kind) as caught:
                make()
            caught.value.__traceback__ = None
    assert files() == before
    assert wrong.read_text() == "precious"
    await holder.close()
    await holder.close()
    again = _router(f"ipc://{taken}", *good)
    await again.close()
    assert sorted(path.name for path in run_directory.iterdir() if path.suffix != ".lock") == ["file", "shared"]


@pytest.mark.usefixtures("transport")
async def test_parties_that_cannot_begin_leave_nothing_open(run_directory: Path) -> None:
    directory = run_directory / "open"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    endpoint = f"ipc://{directory}/c"
    before = files()
    for _ in range(3):
        with pytest.raises(ConfigurationError, match="0777"):
            async with Controller(ControllerConfig(endpoints=(endpoint,))):
                pass
        with pytest.raises(ConfigurationError, match="0777"):
            async with AsyncClient(endpoint):
                pass
        with pytest.raises(ConfigurationError, match="0777"):
            await Fabric(endpoint, None).add_worker("w0")  # type: ignore[arg-type]
    gc.collect()
    assert files() == before


# ── names with several addresses ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names mean here, in this order; all others as elsewhere."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in known:
            return real(host, port, *arguments, **options)
        if not known[host]:
            raise socket.gaierror(socket.EAI_AGAIN, "nobody can be asked")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [
            (families[":" in address], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, int(port)))
            for address in known[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def _has_six() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((SIX, 0))
    except OSError:
        return False
    return True


#: Where a machine has no IPv6, a name is as good with its one address twice.
SIX = SIX if _has_six() else "127.0.0.2"


def _at(address: str, port: str) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


async def _answers(endpoint: str) -> bool:
    async with AsyncClient(endpoint) as client:
        return (await client.generate("echo", "x", max_new_tokens=1)).text == "x "


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("order", [[FOUR, SIX], [SIX, FOUR], [SIX, FOUR, SIX, NOBODYS]])
@pytest.mark.parametrize("port", ["*", "0"])
async def test_a_controller_listens_at_all_addresses_of_its_name(
    names: dict[str, list[str]], order: list[str], port: str
) -> None:
    """On one port, whichever was free; and whoever dials any of them, or the name, gets an answer."""
    names["localhost"] = order
    async with fabric(f"tcp://localhost:{port}") as made:
        assert made.endpoint.startswith("tcp://localhost:")
        await made.add_worker("w0")
        chosen = made.endpoint.rpartition(":")[2]
        assert int(chosen) > 0
        for endpoint in (made.endpoint, _at(FOUR, chosen), _at(SIX, chosen)):
            assert await _answers(endpoint)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("order", [[FOUR, SIX], [SIX, FOUR]])
@pytest.mark.parametrize("listens", [FOUR, SIX])
async def test_a_client_and_a_worker_try_all_addresses_of_a_name(
    names: dict[str, list[str]], order: list[str], listens: str
) -> None:
    names["localhost"] = names["fabric.example"] = order
    async with fabric(_at(listens, "*")) as made:
        port = made.endpoint.rpartition(":")[2]
        made.endpoint = f"tcp://fabric.example:{port}"
        await made.add_worker("w0")
        assert await _answers(f"tcp://localhost:{port}")
        assert await _answers(f"tcp://fabric.example:{port}")


@pytest.mark.usefixtures("transport")
async def test_localhost_is_this_host_whatever_a_resolver_says(names: dict[str, list[str]]) -> None:
    names["localhost"] = ["0.0.0.0", NOBODYS, FOUR]
    async with fabric("tcp://localhost:*") as made:
        process = psutil.Process()
        port = int(made.endpoint.rpartition(":")[2])
        bound = {it.laddr.ip for it in process.net_connections("tcp") if it.laddr.port == port}
        assert bound == {FOUR}


@pytest.mark.usefixtures("transport")
async def test_a_name_that_is_known_later_or_means_another_address_later(names: dict[str, list[str]]) -> None:
    """It is looked up for each round of tries."""
    names["fabric.example"] = []
    async with fabric(_at(FOUR, "*")) as made:
        await made.add_worker("w0")
        async with AsyncClient(f"tcp://fabric.example:{made.endpoint.rpartition(':')[2]}") as client:
            asked = asyncio.create_task(client.generate("echo", "x", max_new_tokens=1))
            link = client._connection._link
            assert link is not None
            async with asyncio.timeout(20):
                while "looked up" not in link.trouble:
                    await asyncio.sleep(0.005)
                names["fabric.example"] = ["127.0.0.3"]
                while "nobody listens" not in link.trouble:
                    await asyncio.sleep(0.005)
                names["fabric.example"] = [FOUR]
                assert (await asked).text == "x "


@pytest.mark.usefixtures("transport")
async def test_a_file_that_is_there_later_or_holds_another_endpoint_later(run_directory: Path) -> None:
    """It is read for each round of tries, so that a controller may move: what ran goes on at the next one."""
    file = run_directory / "endpoint"
    endpoint = f"file://{file}"

    async def troubled(client: AsyncClient, words: str) -> None:
        link = client._connection._link
        assert link is not None
        while words not in link.trouble:
            await asyncio.sleep(0.005)

    for held, words in (("udp://x", "endpoint 'udp://x' is not ipc"), (endpoint, "is a file again")):
        file.write_text(held)
        async with AsyncClient(endpoint) as client:
            with pytest.raises(ConfigurationError, match=words):
                await client.generate("echo", "a b c", max_new_tokens=1)
    file.unlink()
    async with processes(run_directory) as children, AsyncClient(endpoint) as client, asyncio.timeout(60):
        asked = asyncio.create_task(client.generate("echo", "a b c", max_new_tokens=300))
        await troubled(client, "the file cannot be read")
        file.write_text("tcp://127.0.0.1:1\n")
        await troubled(client, "nobody listens there")
        worker = await Process.start(
            "zfabric.cli.worker", "--endpoint", endpoint, "--tokens-per-second", "200", directory=run_directory
        )
        children.append(worker)
        for number in (0, 1):
            place = f"ipc://{run_directory}/{number}"
            controller = await Process.start("zfabric.cli.controller", "--endpoint", place, directory=run_directory)
            children.append(controller)
            await controller.ready()
            file.write_text(place)
            if number == 0:
                while not (await client.status()).in_flight:
                    await asyncio.sleep(0.01)
                controller.kill()
        assert (await asked).text == "a b c " * 100
        assert worker.log.read_text().count('"event": "registered"') == 2


@pytest.mark.usefixtures("transport")
async def test_who_waits_in_vain_is_told_what_was_tried(names: dict[str, list[str]], run_directory: Path) -> None:
    names["fabric.example"] = []
    for endpoint, reason in (
        ("tcp://fabric.example:9", "cannot be looked up"),
        (f"ipc://{run_directory}/c", "there is no such socket"),
        ("tcp://127.0.0.1:1", "nobody listens there"),
        (f"file://{run_directory}/endpoint", "the file cannot be read"),
    ):
        async with AsyncClient(endpoint, connect_timeout_ms=200) as client:
            with pytest.raises(ConnectionLostError, match=reason):
                await client.generate("echo", "x", max_new_tokens=1)


@pytest.mark.usefixtures("transport")
async def test_localhost_on_both_sides_as_processes(run_directory: Path) -> None:
    """With this machine's own idea of what localhost is."""
    async with processes(run_directory) as children:
        controller = await Process.start(
            "zfabric.cli.controller", "--endpoint", "tcp://localhost:0", directory=run_directory
        )
        children.append(controller)
        endpoint = (await controller.ready()).partition("endpoint=")[2]
        assert endpoint.startswith("tcp://localhost:")
        worker = await Process.start("zfabric.cli.worker", "--endpoint", endpoint, directory=run_directory)
        children.append(worker)
        await worker.ready()

        def ask() -> str:
            with Client(endpoint) as client:
                return client.generate("echo", "x", max_new_tokens=1).text

        assert await asyncio.to_thread(ask) == "x "


# ── whose directory it is ───────────────────────────────────────────────────────────────────────────────────────────────


class Impostor:
    """Listens where a controller's socket is looked for."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen()
        self.socket.setblocking(False)

    def was_called(self) -> bool:
        try:
            connection, _ = self.socket.accept()
        except BlockingIOError:
            return False
        connection.close()
        return True


def _give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have somebody else own it, or be somebody else."""
    if os.geteuid() == 0:
        os.lchown(path, 65_534, -1)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)


async def _refused(endpoint: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        async with AsyncClient(endpoint):
            pass
    with pytest.raises(ConfigurationError, match=reason):
        await Fabric(endpoint, None).add_worker("w0")  # type: ignore[arg-type]


@pytest.mark.usefixtures("transport")
async def test_nobody_connects_in_a_strangers_directory(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the default endpoint included; the listener there does not even see a connection."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_directory))
    monkeypatch.delenv("ZFABRIC_ENDPOINT", raising=False)
    directory = run_directory / "zfabric"
    directory.mkdir(mode=0o700)
    impostor = Impostor(directory / "controller.sock")
    assert default_endpoint() == f"ipc://{directory}/controller.sock"
    _give_away(directory, monkeypatch)
    await _refused(default_endpoint(), "belongs to uid")
    with pytest.raises(ConfigurationError, match="belongs to uid"):
        Client().status()
    assert not impostor.was_called()
    impostor.socket.close()


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
async def test_nobody_connects_where_others_may_put_a_socket(run_directory: Path, mode: int) -> None:
    directory = run_directory / "d"
    directory.mkdir()
    impostor = Impostor(directory / "c")
    directory.chmod(mode)
    await _refused(f"ipc://{directory}/c", "others may put a socket there")
    assert not impostor.was_called()
    impostor.socket.close()


@pytest.mark.usefixtures("transport")
async def test_in_a_sticky_directory_the_socket_has_to_be_ones_own(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run_directory / "d"
    directory.mkdir()
    directory.chmod(0o1777)
    impostor = Impostor(directory / "c")
    dealer = _dealer(f"ipc://{directory}/c")
    async with asyncio.timeout(10):
        while not impostor.was_called():
            await asyncio.sleep(0.005)
    dealer.close()
    _give_away(directory / "c", monkeypatch)
    await _refused(f"ipc://{directory}/c", "belongs to uid")
    impostor.socket.close()


@pytest.mark.usefixtures("transport")
async def test_a_strangers_link_is_not_followed(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could lead elsewhere by the time of the connect."""
    directory, link = run_directory / "d", run_directory / "l"
    directory.mkdir(mode=0o700)
    impostor = Impostor(directory / "c")
    link.symlink_to(directory)
    _give_away(link, monkeypatch)
    await _refused(f"ipc://{link}/c", "belongs to uid")
    assert not impostor.was_called()
    impostor.socket.close()


@pytest.mark.usefixtures("transport")
async def test_a_directory_that_a_stranger_makes_later(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits for its controller looks before each try."""
    directory = run_directory / "later"
    async with AsyncClient(f"ipc://{directory}/c") as client:
        asked = asyncio.create_task(client.generate("echo", "x", max_new_tokens=1))
        await asyncio.sleep(0.05)
        made = run_directory / "made"
        made.mkdir(mode=0o700)
        impostor = Impostor(made / "c")
        _give_away(made, monkeypatch)
        made.rename(directory)
        with pytest.raises(ConfigurationError, match="belongs to uid"):
            await asked
        assert not impostor.was_called()
        impostor.socket.close()


def test_systems_without_unix_sockets_say_so() -> None:
    """What Windows would say: no default, no ipc, and tcp works."""
    program = """
import asyncio, concurrent.futures, msgspec, multiprocessing, os, shutil, subprocess, sys, tempfile, zmq, zmq.auth.thread
sys.platform = "win32"
del os.geteuid, os.getuid
for name in ("fcntl", "resource", "pwd", "uvloop"):
    sys.modules[name] = None
from zfabric import AsyncClient
from zfabric.errors import ConfigurationError
from zfabric.controller.config import ControllerConfig
os.environ.pop("ZFABRIC_ENDPOINT", None)
for make in (AsyncClient, lambda: AsyncClient("ipc:///tmp/x"), ControllerConfig):
    try:
        make()
    except ConfigurationError as error:
        print(error)
from zfabric.controller.service import Controller
async def main():
    async with Controller(ControllerConfig(endpoints=("tcp://127.0.0.1:*",))) as controller:
        async with AsyncClient(controller.endpoints[0]) as client:
            print((await client.status()).workers)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "no default endpoint" in lines[0]
    assert "no Unix sockets" in lines[1]
    assert "no default endpoint" in lines[2]
    assert lines[3] == "0"
