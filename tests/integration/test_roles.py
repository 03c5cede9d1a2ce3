"""Every role and every message, query and order, over real sockets: what a key forbids is refused and changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fabric import Fabric, fabric
from tests.keys import credentials, guarded, make_keys
from tests.raw import RawPeer
from zfabric import AsyncClient
from zfabric.core.controller import queries
from zfabric.core.controller.access import Role
from zfabric.errors import PermissionDeniedError, ProtocolError, RequestError
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Cancel
from zfabric.wire.load import Load
from zfabric.wire.messages import (
    Beat,
    CarriedMore,
    Claim,
    Claims,
    ClientHello,
    End,
    Ends,
    ModelInfo,
    Submit,
    WorkerHello,
)
from zfabric.wire.questions import Query

ROLES: Final = [role.value for role in Role]
KEYRING = "".join(f'[{role}]\nrole = "{role}"\nkey = "{role}.key"\n' for role in ROLES)
KEYRING += '[gpu]\nrole = "worker"\nkey = "gpu.key"\n'
CLIENTS: Final = {"client", "operator", "observer"}
DENIED: Final = PermissionDeniedError.code
ORDERS: Final = sorted(queries._CHANGES)
QUESTIONS: Final = sorted({*queries._LISTINGS, "models", "workers", "status"})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("roles"), ("controller", "gpu", *ROLES), KEYRING)


def fault(peer: RawPeer) -> int:
    """The code of the next FAULT or REFUSED."""
    return int(codec.unpack_control(peer.receive_kind(kinds.FAULT, kinds.REFUSED)[0]).code)


def answer(peer: RawPeer, what: str) -> int:
    """The code of the answer to a question or an order about somebody who is not there."""
    peer.send(codec.pack(Query(number=1, what=what, arguments={"client": "nobody"}))[0])
    return int(codec.unpack_control(peer.receive_kind(kinds.ANSWER)[0]).code)


def terminal(peer: RawPeer, request: int, **fields: Any) -> int:
    """The code that a request ends with, of which no chunk is wanted."""
    envelope = Submit(request=request, attempt=0, **{"operation": "generate", "model": "nobody", **fields})
    peer.send(codec.pack_envelope(envelope), b"\x80")
    return int(codec.unpack_envelope(peer.receive_kind(kinds.ENDS)[0]).ends[0].code)


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def on_thread(made: Fabric, keys: Path | None, role: str, act: Any) -> Any:
    """A plain socket's conversation, which blocks."""

    def talk() -> Any:
        with RawPeer(made.endpoint, credentials(keys, role) if keys is not None else None) as peer:
            return act(peer)

    return await asyncio.to_thread(talk)


def say_hello(peer: RawPeer, as_what: str, role: str) -> int:
    """0 for a session, or the code of the refusal."""
    hello: Any = ClientHello(version=kinds.PROTOCOL_VERSION, build="raw", instance=ROLES.index(role) + 1)
    if as_what == "worker":
        models = [ModelInfo(name="raw", capabilities=["generate"])]
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION, build="raw", name=role, instance=9, models=models, load=Load(), beats=False
        )
    peer.send(codec.pack(hello)[0])
    frames = peer.receive_kind(kinds.WELCOME, kinds.REFUSED)
    return 0 if frames[0][0] == kinds.WELCOME else int(codec.unpack_control(frames[0]).code)


#: What only clients send, and what only workers send.
OF_CLIENTS: Final[dict[str, tuple[bytes, ...]]] = {
    "SUBMIT": (codec.pack_envelope(Submit(request=1, attempt=0, operation="generate", model="m")), b"\x80"),
    "CANCEL": (codec.pack(Cancel([1]))[0],),
    "CLAIMS": (codec.pack(Claims([Claim(request=1, attempt=0, next=0, window=1)]))[0],),
    "QUERY": (codec.pack(Query(number=1, what="models", arguments={}))[0],),
}
OF_WORKERS: Final[dict[str, tuple[bytes, ...]]] = {
    "ENDS": (codec.pack_envelope(Ends(instance=1, ends=[End(request=1, attempt=0)])), b""),
    "LOAD": (codec.pack(Load())[0],),
    "CARRIED": (codec.pack(CarriedMore([]))[0],),
}


async def test_each_role_has_the_sessions_that_it_says(ipc: str, keys: Path, role: str) -> None:
    async with guarded(ipc, keys) as made:
        for as_what, allowed in (("client", role in CLIENTS), ("worker", role == "worker")):
            code = await on_thread(made, keys, role, lambda peer, it=as_what: say_hello(peer, it, role))
            assert code == (0 if allowed else DENIED), as_what


async def test_nobody_without_a_session_is_heard(ipc: str, keys: Path, role: str) -> None:
    async with guarded(ipc, keys) as made:

        def talk(peer: RawPeer) -> None:
            for frames in (*OF_CLIENTS.values(), *OF_WORKERS.values()):
                peer.send(*frames)
                assert peer.receive()[0][0] == kinds.UNKNOWN_SESSION

        await on_thread(made, keys, role, talk)
        assert made.controller.broker.in_flight == 0


@pytest.mark.parametrize("guard", [True, False])
async def test_a_session_is_for_the_messages_of_its_kind(ipc: str, keys: Path, guard: bool) -> None:
    """With keys and without."""

    def as_client(peer: RawPeer) -> None:
        peer.hello_as_client()
        for name, frames in OF_WORKERS.items():
            peer.send(*frames)
            assert fault(peer) == ProtocolError.code, name

    def as_worker(peer: RawPeer) -> None:
        peer.hello_as_worker("raw", "raw")
        for name, frames in OF_CLIENTS.items():
            peer.send(*frames)
            assert fault(peer) == ProtocolError.code, name

    async with guarded(ipc, keys) if guard else fabric(ipc) as made:
        await on_thread(made, keys if guard else None, "operator", as_client)
        await on_thread(made, keys if guard else None, "worker", as_worker)


async def test_what_each_role_may_ask_order_and_submit(ipc: str, keys: Path) -> None:
    async with guarded(ipc, keys) as made:
        broker = made.controller.broker
        for name in sorted(CLIENTS):
            found: dict[str, int] = {}

            def talk(peer: RawPeer, found: dict[str, int] = found, name: str = name) -> None:
                assert say_hello(peer, "client", name) == 0
                found |= {what: answer(peer, what) for what in [*QUESTIONS, *ORDERS]}
                found["SUBMIT"] = terminal(peer, 1)
                found["operate"] = terminal(peer, 2, operation="operate", worker="nobody")
                found["priority"] = terminal(peer, 3, priority=-1)
                peer.send(codec.pack(Cancel([1]))[0])
                peer.send(codec.pack(Beat(1))[0])
                assert peer.receive()[0][0] == kinds.BEAT

            paused = dict(broker.registry.directives.paused)
            await on_thread(made, keys, name, talk)
            denied = {what for what, code in found.items() if code == DENIED}
            expected = {
                "client": {*ORDERS, "operate", "priority"},
                "observer": {*ORDERS, "operate", "priority", "SUBMIT"},
                "operator": set(),
            }[name]
            assert denied == expected, name
            # None is named, so none is explained.
            assert found.pop("explain") == RequestError.code
            assert all(found[what] == 0 for what in QUESTIONS if what in found), name
            assert broker.registry.directives.paused == paused
            assert broker.in_flight == 0


async def test_without_keys_everybody_is_everything(ipc: str) -> None:
    async with fabric(ipc) as made:

        def talk(peer: RawPeer) -> list[int]:
            assert say_hello(peer, "client", "client") == 0
            return [answer(peer, what) for what in [*QUESTIONS, *ORDERS]] + [
                terminal(peer, 1, priority=-1_000), terminal(peer, 2, operation="operate", worker="nobody"),
            ]  # fmt: skip

        assert DENIED not in await on_thread(made, None, "client", talk)
        assert await on_thread(made, None, "worker", lambda peer: say_hello(peer, "worker", "worker")) == 0


async def test_an_observer_sees_all_of_it(ipc: str, keys: Path) -> None:
    async with (
        guarded(ipc, keys) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "client"), label="asker") as client,
        AsyncClient(made.endpoint, credentials=credentials(keys, "observer"), label="looker") as looker,
    ):
        stream = client.stream("echo", "a b", max_new_tokens=100_000)
        await anext(stream)
        assert [row.client for row in (await looker.requests()).rows] == ["asker"]
        assert {row.client for row in (await looker.clients()).rows} == {"asker", "looker"}
        assert [worker.name for worker in await looker.workers()] == ["gpu-0"]
        with pytest.raises(PermissionDeniedError, match="may submit no requests"):
            await looker.generate("echo", "x", max_new_tokens=1)
        with pytest.raises(PermissionDeniedError, match="needs an operator's key"):
            await looker.cancel_request(stream.request_id)
        stream.cancel()
