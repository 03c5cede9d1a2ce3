"""Keys: who gets in, and what each may do. One controller with a keyring, real sockets, encrypted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import words
from tests.keys import credentials, guarded, make_keys
from zfabric import AsyncClient, Client, Credentials
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.keyring import KeyRing
from zfabric.errors import (
    AuthenticationError,
    ConfigurationError,
    IncorrectKeyError,
    PermissionDeniedError,
    RequestError,
    StoppedByOperatorError,
    UnsupportedOperationError,
)
from zfabric.transport.curve import create_keys

KEYRING = """
[backend]
role = "client"
key = "backend.key"

[narrow]
role = "client"
key = "narrow.key"
models = ["other-*"]

[gpu]
role = "worker"
key = "gpu.key"
models = ["echo", "other-*"]
workers = ["gpu-*"]

[admin]
role = "operator"
key = "admin.key"
"""
NAMES = ("controller", "backend", "narrow", "gpu", "admin", "stranger")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everybody's keys and the keyring."""
    return make_keys(tmp_path_factory.mktemp("keys"), NAMES, KEYRING)


@pytest.mark.usefixtures("transport")
async def test_a_known_key_gets_its_answer(endpoint: str, keys: Path) -> None:
    async with guarded(endpoint, keys) as made:
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "backend")) as client:
            completion = await client.generate("echo", "secret words", max_new_tokens=50)
        assert completion.text == words("secret words", 50)


async def test_the_blocking_client_takes_its_keys_from_the_environment(
    ipc: str, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(ipc, keys) as made:
        monkeypatch.setenv("ZFABRIC_KEY", str(keys / "backend.key_secret"))
        monkeypatch.setenv("ZFABRIC_CONTROLLER_KEY", str(keys / "controller.key"))

        def ask() -> str:
            with Client(made.endpoint) as client:
                return client.generate("echo", "a b", max_new_tokens=4).text

        assert await asyncio.to_thread(ask) == "a b a b "


@pytest.mark.usefixtures("transport")
async def test_a_stranger_is_told_so_and_harms_nobody(endpoint: str, keys: Path) -> None:
    async with guarded(endpoint, keys) as made:
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "stranger")) as stranger:
            with pytest.raises(IncorrectKeyError, match="does not know this key"):
                await stranger.generate("echo", "x", max_new_tokens=1)
        assert made.controller.broker.registry.clients == {}


@pytest.mark.parametrize(
    ("controller", "kind", "reason"),
    [("stranger", IncorrectKeyError, "has another key"), (None, AuthenticationError, "demands a key")],
)
async def test_without_the_right_controller_key_nothing_connects(
    endpoint: str, keys: Path, controller: str | None, kind: type[AuthenticationError], reason: str
) -> None:
    """And it is said why, long before the time for a controller that is not there."""
    own = credentials(keys, "backend", controller) if controller else None
    async with guarded(endpoint, keys) as made, AsyncClient(made.endpoint, credentials=own) as client:
        with pytest.raises(kind, match=reason):
            await client.generate("echo", "x", max_new_tokens=1)
        assert made.controller.broker.registry.clients == {}


async def test_a_client_is_kept_to_its_models(ipc: str, keys: Path) -> None:
    async with guarded(ipc, keys) as made:
        await made.add_worker(
            "gpu-1", EchoWorker(EchoOptions(model_names=("other-one",))), credentials=credentials(keys, "gpu")
        )
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "narrow")) as client:
            with pytest.raises(PermissionDeniedError, match="no access to model 'echo'"):
                await client.generate("echo", "x", max_new_tokens=1)
            assert (await client.generate("other-one", "x", max_new_tokens=1)).text == "x "


#: Each may be done to a fabric in which nothing runs.
ACTS: dict[str, Callable[[AsyncClient], Awaitable[Any]]] = {
    "drain": lambda client: client.drain_worker("gpu-1"),
    "undrain": lambda client: client.undrain_worker("gpu-1"),
    "refresh": lambda client: client.refresh(),
    "operate": lambda client: client.operate("gpu-1", "reset"),
    "pause": lambda client: client.pause_model("other-one"),
    "resume": lambda client: client.resume_model("echo"),
    "settings": lambda client: client.settings(),
    "change_setting": lambda client: client.change_setting("stall_ms", 50_000),
    "cancel": lambda client: client.cancel_request("abc"),
    "kick": lambda client: client.kick_client("nobody"),
}
#: What an operator is answered where there is nothing to be done: that it is answered shows that it may.
REFUSED: dict[str, type[Exception]] = {
    "operate": UnsupportedOperationError,
    "cancel": RequestError,
    "kick": RequestError,
}


async def test_each_sees_what_is_its_own(ipc: str, keys: Path) -> None:
    async with (
        guarded(ipc, keys) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "backend"), label="one") as one,
        AsyncClient(made.endpoint, credentials=credentials(keys, "backend"), label="other") as other,
        AsyncClient(made.endpoint, credentials=credentials(keys, "admin"), label="admin") as operator,
    ):
        stream = one.stream("echo", "a b", max_new_tokens=100_000)
        await anext(stream)
        assert [row.request for row in (await one.requests()).rows] == [stream.request_id]
        assert (await other.requests()).rows == []
        assert [row.client for row in (await other.clients()).rows] == ["other"]
        assert [row.client for row in (await operator.requests()).rows] == ["one"]
        assert {row.client: row.key for row in (await operator.clients()).rows} == {
            "one": "backend", "other": "backend", "admin": "admin",
        }  # fmt: skip
        with pytest.raises(PermissionDeniedError):
            await other.cancel_request(stream.request_id)
        await operator.cancel_request(stream.request_id)
        with pytest.raises(StoppedByOperatorError, match="by operator 'admin'"):
            [delta async for delta in stream]


@pytest.mark.parametrize("act", ACTS)
async def test_operating_needs_an_operators_key(ipc: str, keys: Path, act: str) -> None:
    async with guarded(ipc, keys) as made:
        await made.add_worker(
            "gpu-1", EchoWorker(EchoOptions(model_names=("echo", "other-one"))), credentials=credentials(keys, "gpu")
        )
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "backend")) as client:
            with pytest.raises(PermissionDeniedError, match="needs an operator's key"):
                await ACTS[act](client)
            assert len(await client.workers()) == 2
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "admin")) as operator:
            refusal = pytest.raises(REFUSED[act]) if act in REFUSED else contextlib.nullcontext()
            with refusal:
                await ACTS[act](operator)
            if act == "pause":
                await operator.resume_model("other-one")
            assert (await operator.generate("echo", "x", max_new_tokens=1)).text == "x "


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("holder", "name", "model", "reason"),
    [
        ("backend", "gpu-1", "echo", "is not a worker's"),
        ("gpu", "cpu-1", "echo", "may not name a worker"),
        ("gpu", "gpu-1", "foreign", "no access to model"),
    ],
)
async def test_a_worker_is_what_its_key_says(
    ipc: str, keys: Path, holder: str, name: str, model: str, reason: str
) -> None:
    async with guarded(ipc, keys) as made:
        with pytest.raises(PermissionDeniedError, match=reason):
            await made.add_worker(
                name, EchoWorker(EchoOptions(model_names=(model,))), credentials=credentials(keys, holder)
            )
        made.services.pop(name)
        assert set(made.controller.broker.registry.workers) == {"gpu-0"}


async def test_a_worker_cannot_pose_as_a_client(ipc: str, keys: Path) -> None:
    async with guarded(ipc, keys) as made, AsyncClient(made.endpoint, credentials=credentials(keys, "gpu")) as client:
        with pytest.raises(PermissionDeniedError, match="is not a client's"):
            await client.generate("echo", "x", max_new_tokens=1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no key"),
        ("[a]\nrole = 'king'\nkey = 'backend.key'", "king"),
        ("[a]\nrole = 'client'", "key"),
        ("[a]\nrole = 'client'\nkey = 'missing.key'", "missing.key"),
        ("[a]\nrole = 'client'\nkey = 'short'", "5 characters"),
        (f"[a]\nrole = 'client'\nkey = '{'~' * 40}'", "not in Z85"),
        (f"[a]\nrole = 'client'\nkey = '{'#' * 40}'", "not in Z85"),
        ('[a]\nrole = "client"\nkey = "a\\u0000.key"', "not a key file"),
        ("[a]\nrole = 'client'\nkey = 'backend.key'\n[b]\nrole = 'worker'\nkey = 'backend.key'", "has the key of"),
        ("[a]\nrole = 'client'\nkey = 'backend.key'\nmodel = 'x'", "model"),
        ("a = [", "cannot be read"),
    ],
)
def test_a_wrong_keyring_names_the_place(keys: Path, text: str, reason: str) -> None:
    path = keys / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=reason):
        KeyRing.load(path)


def test_a_secret_is_neither_shown_nor_shared_nor_replaced(keys: Path) -> None:
    own = credentials(keys, "backend")
    assert own.keys.secret.decode() not in repr(own)
    with pytest.raises(ConfigurationError, match="never overwritten"):
        create_keys(keys, "backend")
    with pytest.raises(ConfigurationError, match="no secret key"):
        Credentials.load(keys / "backend.key", keys / "controller.key")
    public = keys / "open.key_secret"
    public.write_text((keys / "backend.key_secret").read_text())
    public.chmod(0o644)
    with pytest.raises(ConfigurationError, match="0600"):
        Credentials.load(public, keys / "controller.key")
