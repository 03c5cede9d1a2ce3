"""docs/security.md: what is shown is run, in order."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
from pathlib import Path

import pytest

from tests.fabric import Process, processes
from tests.keys import credentials
from zfabric import AsyncClient
from zfabric.cli.main import main
from zfabric.controller.keyring import KeyRing
from zfabric.core.controller.access import Role
from zfabric.errors import IncorrectKeyError
from zfabric.transport.curve import create_keys

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text()
SETUP, ROTATION = (
    [shlex.split(line) for line in it.splitlines()] for it in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
)
CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"


async def run(command: list[str]) -> None:
    assert command[0] == "zfabric"
    assert await asyncio.to_thread(main, command[1:]) == 0


def here(command: list[str], ipc: str) -> list[str]:
    """A daemon's arguments, at an endpoint of this test's."""
    return [ipc if word.startswith("tcp://") else word for word in command[1:]]


async def until(child: Process, event: str, count: int = 1) -> None:
    async with asyncio.timeout(60):
        while child.log.read_text().count(f'"event": "{event}"') < count:
            await asyncio.sleep(0.02)


async def test_the_set_up_works_and_keys_rotate_without_downtime(
    ipc: str, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    *makes, controller, worker = SETUP
    for command in makes:
        await run(command)
    async with processes(run_directory) as children:
        broker = await Process.start(
            CONTROLLER, *here(controller, ipc), "--log-format", "json", directory=run_directory
        )
        children.append(broker)
        await broker.ready()
        children.append(
            await Process.start(WORKER, *here(worker, ipc), "--tokens-per-second", "200", directory=run_directory)
        )
        await children[-1].ready()
        async with AsyncClient(ipc, credentials=credentials(tmp_path, "backend")) as old:
            stream = old.stream("echo", "a b", max_new_tokens=100_000)
            await anext(stream)
            rotate, lists, removes = ROTATION
            await run(rotate)
            await until(broker, "keys", 2)
            await run(lists)
            async with AsyncClient(ipc, credentials=credentials(tmp_path, "backend-2")) as new:
                going = new.stream("echo", "a b", max_new_tokens=100_000)
                await anext(going)
                await anext(stream)
                await run(removes)
                with pytest.raises(IncorrectKeyError):
                    [delta async for delta in stream]
                await anext(going)
                going.cancel()


async def test_a_hangup_has_the_keyring_read(ipc: str, run_directory: Path, tmp_path: Path) -> None:
    create_keys(tmp_path, "controller")
    ring = tmp_path / "keyring.toml"
    assert await asyncio.to_thread(main, ["keys", "make", "one", "--keyring", str(ring), "--role", "observer"]) == 0
    async with processes(run_directory) as children:
        broker = await Process.start(
            CONTROLLER, "--endpoint", ipc, "--key", str(tmp_path / "controller.key_secret"), "--keyring", str(ring),
            "--log-format", "json", directory=run_directory,
        )  # fmt: skip
        children.append(broker)
        await broker.ready()
        stamp, text = ring.stat(), ring.read_text()
        # What looks the same is read all the same when it is asked for.
        ring.write_text(text.replace("observer", "operator"))
        os.utime(ring, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        broker.kill(signal.SIGHUP)
        await until(broker, "keys", 2)
        async with AsyncClient(ipc, credentials=credentials(tmp_path, "one")) as client:
            assert await client.settings()
        broker.kill(signal.SIGTERM)
        assert await broker.ended() == 0


def test_the_keyring_that_is_shown_is_one(tmp_path: Path) -> None:
    [block] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    for name in ("backend", "website", "gpu"):
        create_keys(tmp_path, name)
    ring = KeyRing.parse(block, tmp_path / "keyring.toml")
    assert {known.grant.name for known in ring.keys.values()} == {"backend", "website", "gpu"}
    shown = set(re.findall(r"^(\w+) =", block, re.MULTILINE))
    # What a rotation writes is no setting of a person's.
    assert shown | {"former", "former_expires"} == set(_fields())
    assert all(f'"{role.value}"' in block for role in Role)


def _fields() -> tuple[str, ...]:
    from zfabric.controller.keyring import _Entry

    return _Entry.__struct_fields__


def test_every_limit_is_explained() -> None:
    part = PAGE.partition("## Limits of a key")[2].partition("## Rotation")[0]
    for name in ("priorities", "prompt_bytes", "requests_in_flight", "requests_per_second", "tokens_per_minute"):
        assert f"| `{name}` |" in part
