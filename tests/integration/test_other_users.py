"""Whose connections an ipc endpoint takes: the kernel is asked who is at the other end."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from zfabric import AsyncClient
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.errors import ConfigurationError
from zfabric.transport import loop_accept
from zfabric.transport.ipc import peer_uid


def somebody_else(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Who connects is another user, as far as the kernel says. Returns who was asked for."""
    asked: list[int] = []

    def uid(connected: object) -> int:
        real = peer_uid(connected)  # type: ignore[arg-type]
        assert real is not None
        asked.append(real)
        return real + 4_711

    monkeypatch.setattr(loop_accept, "peer_uid", uid)
    return asked


async def test_an_ipc_endpoint_is_for_its_own_user(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"ipc://{run_directory}/own/c"
    asked = somebody_else(monkeypatch)
    async with Controller(ControllerConfig(endpoints=(endpoint,), transport="loop")) as controller:
        assert stat.S_IMODE((run_directory / "own").stat().st_mode) == 0o700
        assert stat.S_IMODE((run_directory / "own" / "c").stat().st_mode) & 0o077 == 0
        reader, writer = await asyncio.open_unix_connection(endpoint.removeprefix("ipc://"))
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()
        assert len(asked) == controller._figures()["handshakes_refused"] == 1


async def test_others_are_let_in_where_that_is_said(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"ipc://{run_directory}/all/c"
    asked = somebody_else(monkeypatch)
    async with Controller(ControllerConfig(endpoints=(endpoint,), transport="loop", other_users=True)) as controller:
        async with AsyncClient(endpoint, transport="loop") as client:
            assert (await client.status()).workers == 0
        assert stat.S_IMODE((run_directory / "all" / "c").stat().st_mode) & 0o006 == 0o006
        assert asked
        assert controller._figures()["handshakes_refused"] == 0
    (run_directory / "all").chmod(0o777)
    with pytest.raises(ConfigurationError, match="must be 0755"):
        async with Controller(ControllerConfig(endpoints=(endpoint,), transport="loop", other_users=True)):
            pass


async def test_libzmq_cannot_tell_users_apart(run_directory: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot take ipc connections of other users"):
        async with Controller(
            ControllerConfig(endpoints=(f"ipc://{run_directory}/z/c",), transport="libzmq", other_users=True)
        ):
            pass
