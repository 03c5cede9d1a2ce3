"""Keys that change while a fabric runs: over real sockets, by both drivers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Fabric
from tests.keys import credentials, guarded, make_keys, put_keyring
from zfabric import AsyncClient, files
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import IncorrectKeyError, PermissionDeniedError, RateLimitedError
from zfabric.ids import RoutingId

GPU = '[gpu]\nrole = "worker"\nkey = "gpu.key"\n'
ONE = '[one]\nrole = "client"\nkey = "one.key"\n'
TWO = '[two]\nrole = "client"\nkey = "two.key"\n'
pytestmark = pytest.mark.usefixtures("transport")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "KEYS_LOOK_MS", 5)
    return make_keys(tmp_path, ("controller", "gpu", "one", "two", "extra"), GPU + ONE + TWO)


class Told:
    """A log that can be waited for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._came = asyncio.Event()

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self._came.set()

    async def once(self, event: str) -> dict[str, Any]:
        """The fields of the next such event, which is not told of again."""
        async with asyncio.timeout(30):
            while True:
                for position, (name, fields) in enumerate(self.events):
                    if name == event:
                        del self.events[: position + 1]
                        return fields
                self._came.clear()
                await self._came.wait()


def connections(made: Fabric) -> set[RoutingId]:
    """Connections whose key is known."""
    link = made.controller._link
    assert link is not None
    return set(link.keyed())


async def until_left(made: Fabric, count: int) -> None:
    async with asyncio.timeout(30):
        while len(connections(made)) > count:
            await asyncio.sleep(0.01)


async def test_a_key_that_is_taken_out_loses_its_connection_and_nobody_else_notices(ipc: str, keys: Path) -> None:
    told = Told()
    slow = EchoWorker(EchoOptions(tokens_per_second=200, model_names=("slow",)))
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
        AsyncClient(made.endpoint, credentials=credentials(keys, "two")) as two,
    ):
        await made.add_worker("gpu-1", slow, credentials=credentials(keys, "gpu"))
        leaving = one.stream("slow", "a b", max_new_tokens=100_000)
        staying = two.stream("slow", "a b", max_new_tokens=100_000)
        await anext(leaving)
        await anext(staying)
        session = made.controller.broker.registry.clients.copy()
        assert len(connections(made)) == 4
        put_keyring(keys, GPU + TWO)
        with pytest.raises(IncorrectKeyError, match="does not know this key any more"):
            [delta async for delta in leaving]
        fields = await told.once("session_revoked")
        assert (fields["key"], fields["in_flight"]) == ("one", 1)
        with pytest.raises(IncorrectKeyError):
            await one.generate("echo", "x", max_new_tokens=1)
        await until_left(made, 3)
        await anext(staying)
        (left,) = made.controller.broker.registry.clients.items()
        assert left in session.items()
        staying.cancel()
        await told.once("keys")
        put_keyring(keys, GPU + TWO + ONE)
        await told.once("keys")
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as back:
            assert (await back.generate("echo", "x", max_new_tokens=1)).text == "x "


async def test_a_key_that_expires_loses_its_connection(ipc: str, keys: Path) -> None:
    expiring = ONE + "expires = 2100-01-01T00:00:00Z\n"
    put_keyring(keys, GPU + TWO + expiring)
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
        AsyncClient(made.endpoint, credentials=credentials(keys, "two")) as two,
    ):
        assert (await one.generate("echo", "x", max_new_tokens=1)).text == "x "
        assert (await two.generate("echo", "x", max_new_tokens=1)).text == "x "
        live = made.controller._keys
        assert live is not None
        live._wall_clock_s = lambda: 4_102_444_800.0  # type: ignore[misc]
        assert (await told.once("session_revoked"))["key"] == "one"
        await until_left(made, 2)
        with pytest.raises(IncorrectKeyError):
            await one.generate("echo", "x", max_new_tokens=1)
        assert (await two.generate("echo", "x", max_new_tokens=1)).text == "x "


async def test_a_worker_whose_key_is_taken_out_is_gone_and_its_streams_go_on_elsewhere(ipc: str, keys: Path) -> None:
    extra = '[extra]\nrole = "worker"\nkey = "extra.key"\n'
    put_keyring(keys, GPU + ONE + extra)
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
    ):
        options = EchoOptions(tokens_per_second=200, model_names=("slow",))
        await made.add_worker("leaving", EchoWorker(options), credentials=credentials(keys, "extra"))
        stream = one.stream("slow", "a b", max_new_tokens=60, temperature=0.0)
        first = await anext(stream)
        await made.add_worker("staying", EchoWorker(options), credentials=credentials(keys, "gpu"))
        put_keyring(keys, GPU + ONE)
        assert (await told.once("session_revoked"))["peer"] == "worker leaving"
        text = first.text + "".join([delta.text async for delta in stream])
        assert text == "a b " * 30
        assert set(made.controller.broker.registry.workers) == {"gpu-0", "staying"}
        made.services.pop("leaving")
        with pytest.raises(IncorrectKeyError):
            await made.tasks.pop("leaving")


@pytest.mark.parametrize("role", ["observer", "worker", "operator"])
async def test_another_role_begins_with_another_session(ipc: str, keys: Path, role: str) -> None:
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
    ):
        await one.generate("echo", "x", max_new_tokens=1)
        put_keyring(keys, GPU + ONE.replace("client", role))
        assert (await told.once("session_revoked"))["code"] == PermissionDeniedError.code


async def test_limits_and_models_change_without_an_end(ipc: str, keys: Path) -> None:
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
    ):
        await one.generate("echo", "x", max_new_tokens=1)
        sessions = dict(made.controller.broker.sessions.peers)
        put_keyring(keys, GPU + ONE + 'models = ["other"]\n')
        await told.once("keys")
        await told.once("keys")
        with pytest.raises(PermissionDeniedError, match="no access to model"):
            await one.generate("echo", "x", max_new_tokens=1)
        put_keyring(keys, GPU + ONE + "requests_per_second = 0.0001\n")
        await told.once("keys")
        await one.generate("echo", "x", max_new_tokens=1)
        with pytest.raises(RateLimitedError) as limited:
            await one.generate("echo", "x", max_new_tokens=1)
        assert 0 < limited.value.details["retry_after_ms"] <= 10_000_000  # type: ignore[operator]
        # It was said once, and not asked for again.
        assert made.controller.broker.scheduler.figures.failures[RateLimitedError.code] == 1
        assert made.controller.broker.sessions.peers == sessions


async def test_a_broken_file_keeps_the_old_keys(ipc: str, keys: Path) -> None:
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
    ):
        await told.once("keys")
        for text, reason in (("[one", "cannot be read"), ("", "names no key"), (GPU + '[x]\nrole = "king"', "king")):
            put_keyring(keys, text)
            fields = await told.once("keys_kept")
            assert reason in fields["error"]
            assert (await one.generate("echo", "x", max_new_tokens=1)).text == "x "
        (keys / "keyring.toml").unlink()
        assert "cannot be read" in (await told.once("keys_kept"))["error"]
        assert (await one.generate("echo", "x", max_new_tokens=1)).text == "x "


async def test_a_key_file_beside_the_keyring_is_looked_at_too(ipc: str, keys: Path) -> None:
    told = Told()
    async with (
        guarded(ipc, keys, told) as made,
        AsyncClient(made.endpoint, credentials=credentials(keys, "one")) as one,
    ):
        await one.generate("echo", "x", max_new_tokens=1)
        (keys / "extra.key").replace(keys / "one.key")
        assert (await told.once("session_revoked"))["key"] == "one"
        async with AsyncClient(made.endpoint, credentials=credentials(keys, "extra")) as other:
            assert (await other.generate("echo", "x", max_new_tokens=1)).text == "x "
