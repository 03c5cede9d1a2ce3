"""A stream that outlives its controller is its client's alone, whatever others tell the next one, with keys of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Fabric, at_rest
from tests.gateway.backends import Slow
from tests.keys import credentials, make_keys
from tests.raw import RawPeer
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import NameTakenError, PermissionDeniedError
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Cancel, Credit, CreditLine
from zfabric.wire.messages import Claim, Claims, ClientHello, Submit
from zfabric.wire.payloads import GenerateRequest

KEYRING = "".join(
    f'[{name}]\nrole = "{role}"\nkey = "{name}.key"\n'
    for name, role in {"gpu": "worker", "one": "client", "two": "client", "guest": "observer"}.items()
)
INSTANCE, REQUEST = 4_711, 17
SECRET = b"what the first client knows     "
_WINDOW = 1


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return make_keys(tmp_path, ("controller", "gpu", "one", "two", "guest"), KEYRING)


class Restarted(Fabric):
    """A fabric whose controller is new. Its worker runs a stream of the first client's, and has told of it."""

    slow: Slow

    def carried(self) -> list[tuple[str, int]]:
        """What the worker carries, as the controller knows it: states, and units that may be sent."""
        worker = self.controller.broker.registry.workers.get("gpu-0")
        return [(request.state.name, request.window) for request in worker.live.values()] if worker is not None else []

    async def check_untouched(self) -> None:
        """The stream runs on for whoever can claim it, and nobody else is there."""
        async with asyncio.timeout(30):
            while self.controller.broker.registry.clients:
                await asyncio.sleep(0.005)
        assert self.carried() == [("RECOVERED", 0)]
        assert not self.slow.stopped.is_set()


@pytest.fixture
async def restarted(ipc: str, keys: Path) -> AsyncIterator[Restarted]:
    """A stream of which the first word was read, and a new controller."""
    config = ControllerConfig(
        endpoints=(ipc,),
        key=keys / "controller.key_secret",
        keyring=keys / "keyring.toml",
        broker=BrokerConfig(recovery_ms=30_000),
    )
    async with contextlib.AsyncExitStack() as held:
        async with Controller(config) as former:
            made = Restarted(ipc, former)
            made.slow = Slow()
            await made.add_worker("gpu-0", made.slow, credentials=credentials(keys, "gpu"))
            await talk(keys, made, "one", begin)
        made.controller = await held.enter_async_context(Controller(config))
        held.push_async_callback(made.remove_worker, "gpu-0")
        async with asyncio.timeout(30):
            while not made.carried():
                await asyncio.sleep(0.005)
        yield made
        await at_rest(made.controller)


async def talk(keys: Path, made: Restarted, key: str, act: Callable[[RawPeer], Any]) -> Any:
    """A plain socket's conversation, which blocks."""

    def converse() -> Any:
        with RawPeer(made.endpoint, credentials(keys, key)) as peer:
            return act(peer)

    return await asyncio.to_thread(converse)


def hello(peer: RawPeer, instance: int, secret: bytes, *claims: Claim) -> int:
    """0 for a session, or the code of the refusal."""
    peer.send(
        codec.pack(
            ClientHello(
                version=kinds.PROTOCOL_VERSION, build="raw", instance=instance, secret=secret, claims=list(claims)
            )
        )[0]
    )
    frames = peer.receive_kind(kinds.WELCOME, kinds.REFUSED)
    return 0 if frames[0][0] == kinds.WELCOME else int(codec.unpack_control(frames[0]).code)


def claim(next_unit: int) -> Claim:
    return Claim(request=REQUEST, attempt=0, next=next_unit, window=1_000, model="slow")


def begin(peer: RawPeer) -> None:
    """Submit, and read as much as there is credit for."""
    assert hello(peer, INSTANCE, SECRET) == 0
    submit = Submit(request=REQUEST, attempt=0, operation="generate", model="slow", window=_WINDOW)
    peer.send(codec.pack_envelope(submit), codec.encode(GenerateRequest(prompt="one two")))
    peer.receive_kind(kinds.CHUNKS)


async def check_goes_on(keys: Path, made: Restarted) -> None:
    """Its client claims the stream from its beginning, and reads it to its end."""

    def go_on(peer: RawPeer) -> bytes:
        assert hello(peer, INSTANCE, SECRET, claim(0)) == 0
        found = peer.receive_kind(kinds.CHUNKS)[0]
        made.controller._loop.call_soon_threadsafe(made.slow.go_on.set)
        while (frames := peer.receive_kind(kinds.CHUNKS, kinds.ENDS))[0][0] == kinds.CHUNKS:
            found += frames[0]
        assert codec.unpack_envelope(frames[0]).ends[0].code == 0
        # What was made when the terminal left comes with it.
        return found + frames[1]

    found = await talk(keys, made, "one", go_on)
    assert found.index(b"begun ") < found.index(b"done")


def meddle(peer: RawPeer, own_instance: int) -> list[int]:
    """Say of another's stream all that its client may, from a session of one's own. Returns the code of each end."""
    assert hello(peer, own_instance, b"") == 0
    line = CreditLine(request=REQUEST, attempt=0, next=_WINDOW, window=1_000_000, again=True)
    told: list[int] = []
    for message in (Claims([claim(0)]), Credit([line]), Cancel([REQUEST])):
        peer.send(codec.pack(message)[0])
    # What was sent before it has been heard when this has its answer.
    envelope = Submit(request=REQUEST + 1, attempt=0, operation="generate", model="nobody", deadline_ms=1)
    peer.send(codec.pack_envelope(envelope), b"\x80")
    while True:
        for end in codec.unpack_envelope(peer.receive_kind(kinds.ENDS)[0]).ends:
            if end.request == REQUEST + 1:
                return told
            told.append(int(end.code))


@pytest.mark.parametrize("key", ["two", "guest"])
async def test_nobody_else_gets_at_a_stream(restarted: Restarted, keys: Path, key: str) -> None:
    """From a session of its own: nothing of that number is there to be claimed, cancelled or given credit."""
    await talk(keys, restarted, key, lambda peer: meddle(peer, 1))
    await restarted.check_untouched()
    await check_goes_on(keys, restarted)


@pytest.mark.parametrize("key", ["two", "guest"])
async def test_nobody_else_is_heard_under_the_clients_number(restarted: Restarted, keys: Path, key: str) -> None:
    """Once the client is back its number is taken, whether the session lasts or not."""

    def both(peer: RawPeer) -> None:
        assert hello(peer, INSTANCE, SECRET) == 0
        with RawPeer(restarted.endpoint, credentials(keys, key)) as other:
            assert hello(other, INSTANCE, b"", claim(0)) == NameTakenError.code
            assert hello(other, INSTANCE, b"a guess", claim(0)) == NameTakenError.code

    await talk(keys, restarted, "one", both)
    await restarted.check_untouched()
    await check_goes_on(keys, restarted)


@pytest.mark.parametrize("secret", [b"", b"a guess"])
async def test_an_observer_who_comes_first_gets_nothing_and_holds_nothing(
    restarted: Restarted, keys: Path, secret: bytes
) -> None:
    """It may have a session under any number that is free, and claims nothing in it."""

    def come_first(peer: RawPeer) -> int:
        assert hello(peer, INSTANCE, secret, claim(0)) == 0
        frames = peer.receive_kind(kinds.CHUNKS, kinds.ENDS)
        return int(codec.unpack_envelope(frames[0]).ends[0].code)

    assert await talk(keys, restarted, "guest", come_first) == PermissionDeniedError.code
    await restarted.check_untouched()
    await check_goes_on(keys, restarted)


async def test_another_client_who_comes_first_reads_nothing(restarted: Restarted, keys: Path) -> None:
    """Its claim waits for what opens its own lock, until it takes that back; the stream stays as it is."""

    def come_first(peer: RawPeer) -> int:
        assert hello(peer, INSTANCE, b"", claim(0)) == 0
        peer.send(codec.pack(Credit([CreditLine(request=REQUEST, attempt=0, next=0, window=1_000_000)]))[0])
        peer.send(codec.pack(Cancel([REQUEST]))[0])
        frames = peer.receive_kind(kinds.CHUNKS, kinds.ENDS)
        return int(codec.unpack_envelope(frames[0]).ends[0].code)

    assert await talk(keys, restarted, "two", come_first) != 0
    await restarted.check_untouched()
    await check_goes_on(keys, restarted)
