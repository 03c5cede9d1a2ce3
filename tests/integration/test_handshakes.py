"""Keys that do not match: both sides say what is wrong, long before the time for a controller that is not there."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Fabric
from tests.raw import RawPeer
from zfabric import AsyncClient, Credentials
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import AuthenticationError, ConnectionLostError, IncorrectKeyError
from zfabric.limits import HANDSHAKE_LOG_MS
from zfabric.transport.curve import create_keys
from zfabric.transport.endpoints import parse_endpoint
from zfabric.transport.greeting import exchange_mechanisms
from zfabric.transport.handshakes import Handshakes
from zfabric.transport.monitor import Happened


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    for name in ("controller", "other", "user", "gpu", "stranger"):
        create_keys(directory, name)
    (directory / "keyring.toml").write_text(
        '[user]\nrole = "client"\nkey = "user.key"\n[gpu]\nrole = "worker"\nkey = "gpu.key"\n'
    )
    return directory


def credentials(keys: Path, name: str | None, controller: str = "controller") -> Credentials | None:
    return Credentials.load(keys / f"{name}.key_secret", keys / f"{controller}.key") if name else None


@contextlib.asynccontextmanager
async def controller(endpoint: str, keys: Path | None) -> AsyncIterator[tuple[Controller, Counter[str]]]:
    """With what it logged of handshakes."""
    logged: Counter[str] = Counter()

    def log(event: str, **fields: Any) -> None:
        if event == "handshake_failed":
            logged[fields["reason"]] += fields["count"]

    config = ControllerConfig(
        endpoints=(endpoint,),
        key=keys / "controller.key_secret" if keys else None,
        keyring=keys / "keyring.toml" if keys else None,
        broker=BrokerConfig(recovery_ms=0),
    )
    async with Controller(config, log=log) as made:
        yield made, logged


#: Whether the controller has keys, whose key the client has, the controller's key it was given, the error, what each side says.
WRONG = [
    (False, "user", "controller", AuthenticationError, "has no keys", "this controller has none"),
    (True, None, "controller", AuthenticationError, "demands a key", "the peer has no key"),
    (True, "user", "other", IncorrectKeyError, "has another key", "expects another controller's key"),
    (True, "stranger", "controller", IncorrectKeyError, "does not know this key", "not in the keyring"),
]


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(("guarded", "name", "known", "kind", "says", "logs"), WRONG)
async def test_both_sides_say_what_is_wrong(
    endpoint: str,
    keys: Path,
    guarded: bool,
    name: str | None,
    known: str,
    kind: type[AuthenticationError],
    says: str,
    logs: str,
) -> None:
    own = credentials(keys, name, known)
    async with controller(endpoint, keys if guarded else None) as (made, logged):
        where = made.endpoints[0]
        async with asyncio.timeout(8):
            async with AsyncClient(where, credentials=own) as client:
                for ask in (client.generate("echo", "x", max_new_tokens=1), client.status()):
                    with pytest.raises(kind, match=says) as caught:
                        await ask
                    assert type(caught.value) is kind
            with pytest.raises(kind, match=says):
                await Fabric(where, made).add_worker("w0", credentials=own)
            while not any(logs in reason for reason in logged):
                await asyncio.sleep(0.01)
        assert set(logged) == {reason for reason in logged if logs in reason}
        assert made.broker.transport_figures()["handshakes_failed"] > 0
        assert made.broker.registry.clients == {}


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("first", [True, False])
async def test_who_was_told_so_connects_when_it_was_put_right(ipc: str, keys: Path, first: bool) -> None:
    """The same client, without another call: the controller is started anew with keys, or without."""
    own = credentials(keys, None if first else "user")
    async with AsyncClient(ipc, credentials=own) as client:
        async with controller(ipc, keys if first else None):
            with pytest.raises(AuthenticationError):
                await client.status()
        async with controller(ipc, None if first else keys), asyncio.timeout(10):
            while True:
                with contextlib.suppress(AuthenticationError):
                    assert (await client.status()).workers == 0
                    break


@pytest.mark.usefixtures("transport")
async def test_a_worker_that_has_served_waits_for_its_controller_to_be_put_right(ipc: str, keys: Path) -> None:
    """It has a model in memory, and the controller was only started with the wrong settings for a moment."""
    async with controller(ipc, keys) as (made, _):
        fabric = Fabric(ipc, made)
        service = await fabric.add_worker("w0", credentials=credentials(keys, "gpu"))
    async with controller(ipc, None) as (made, logged), asyncio.timeout(20):
        while not logged:
            await asyncio.sleep(0.01)
        assert not fabric.tasks["w0"].done()
    async with controller(ipc, keys) as (made, _), asyncio.timeout(20):
        while not made.broker.registry.workers:
            await asyncio.sleep(0.01)
        assert fabric.services["w0"] is service
        await fabric.remove_worker("w0")


class Slamming:
    """Accepts connections and closes them, as a controller does that just ends, or a proxy without one."""

    def __init__(self, path: str, wait_for_bytes: bool) -> None:
        self.path = path
        self.count = 0
        self._wait = wait_for_bytes

    async def __aenter__(self) -> Slamming:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        Path(self.path).unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        if self._wait:
            await reader.read(1)
        writer.transport.abort()


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("name", ["user", None])
@pytest.mark.parametrize("wait", [True, False])
async def test_a_handshake_that_just_breaks_is_tried_again(ipc: str, keys: Path, name: str | None, wait: bool) -> None:
    """However often: nothing tells that keys are to blame, and whoever waits gets an answer in the end."""
    async with AsyncClient(ipc, credentials=credentials(keys, name)) as client:
        async with Slamming(ipc.removeprefix("ipc://"), wait) as slamming:
            asked = asyncio.create_task(client.status())
            async with asyncio.timeout(20):
                while slamming.count < 8:
                    await asyncio.sleep(0.01)
            assert not asked.done()
        async with controller(ipc, keys if name else None):
            assert (await asked).workers == 0


@pytest.mark.usefixtures("transport")
async def test_a_listener_that_ends_each_handshake_is_named_in_the_end(ipc: str) -> None:
    async with Slamming(ipc.removeprefix("ipc://"), True), AsyncClient(ipc, connect_timeout_ms=500) as client:
        with pytest.raises(ConnectionLostError, match="no controller"):
            await client.status()


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("own", ["NULL", "CURVE"])
async def test_what_the_other_end_speaks(endpoint: str, keys: Path, run_directory: Path, own: str) -> None:
    """And it hears of a mechanism that is not its own."""
    for guarded, mechanism in ((None, "NULL"), (keys, "CURVE")):
        async with controller(endpoint, guarded) as (made, logged), asyncio.timeout(10):
            assert await exchange_mechanisms(parse_endpoint(made.endpoints[0]), own) == mechanism
            while not logged and mechanism != own:
                await asyncio.sleep(0.005)
    assert await exchange_mechanisms(parse_endpoint(f"ipc://{run_directory}/nobody"), own) is None
    async with Slamming(str(run_directory / "s"), True):
        assert await exchange_mechanisms(parse_endpoint(f"ipc://{run_directory}/s"), own) is None


@pytest.mark.usefixtures("transport")
async def test_garbage_is_counted_and_not_logged(ipc: str) -> None:
    """Port scans and health checks are nothing that an operator has to read of."""
    async with controller(ipc, None) as (made, logged), asyncio.timeout(10):
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff", b"\xff" + bytes(8) + b"\x7f\x03"):
            _, writer = await asyncio.open_unix_connection(ipc.removeprefix("ipc://"))
            writer.write(data)
            await writer.drain()
            writer.close()
        while made.broker.transport_figures()["handshakes_failed"] < 3:
            await asyncio.sleep(0.01)
        assert not logged


def test_a_flood_of_failures_is_one_line_in_a_while() -> None:
    handshakes = Handshakes(has_keys=True)
    lines = 0
    for second in range(60):
        for _ in range(1_000):
            handshakes.note(Happened.MISMATCH)
            handshakes.note(Happened.BROKEN)
        lines += len(handshakes.due(second * 1_000_000_000))
    assert handshakes.failed == 120_000
    assert lines == 60_000 // HANDSHAKE_LOG_MS
    handshakes.note(Happened.DENIED)
    assert handshakes.due(60_000_000_000)[-1] == ("the peer's key is not in the keyring", 1)


@pytest.mark.usefixtures("transport")
async def test_a_peer_that_disagrees_holds_up_nobody(endpoint: str, keys: Path) -> None:
    """Handshakes fail beside a client that is served."""
    async with controller(endpoint, keys) as (made, _):
        own = credentials(keys, "user")
        async with AsyncClient(made.endpoints[0], credentials=own) as client:
            with RawPeer(made.endpoints[0], reconnect_ivl=1) as _:
                for _ in range(20):
                    assert (await client.status()).workers == 0
