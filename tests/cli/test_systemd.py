"""Services of systemd: what the daemons tell the service manager, and that the shipped units are sound."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Process, processes
from zfabric.cli import controller, gateway, systemd, worker

UNITS = sorted((Path(__file__).resolve().parents[2] / "packaging" / "systemd").glob("*.service"))
BUILDERS: dict[str, Any] = {
    "zfabric-controller": controller.build,
    "zfabric-gateway": gateway.build,
    "zfabric-worker": worker.build,
}
#: Of each unit, the time that a drain may take before it is killed.
DRAIN_S = {"zfabric-controller": 30, "zfabric-gateway": 30, "zfabric-worker": 40}


class Manager:
    """The end of a service manager's socket."""

    def __init__(self, address: str | bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    async def said(self) -> dict[str, str]:
        """The next message."""
        async with asyncio.timeout(30):
            data = await asyncio.get_running_loop().sock_recv(self._socket, 4_096)
        return dict(line.split("=", 1) for line in data.decode().splitlines())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(run_directory: Path) -> Iterator[Manager]:
    made = Manager(str(run_directory / "notify.sock"))
    yield made
    made.close()


async def test_a_service_says_that_it_is_ready_that_it_lives_and_that_it_stops(
    manager: Manager, ipc: str, run_directory: Path
) -> None:
    async with processes(run_directory) as children:
        daemon = await Process.start(
            "zfabric.cli.controller", "--endpoint", ipc, directory=run_directory,
            NOTIFY_SOCKET=str(run_directory / "notify.sock"), WATCHDOG_USEC="50000",
        )  # fmt: skip
        children.append(daemon)
        assert await manager.said() == {"READY": "1", "STATUS": f"endpoint={ipc}"}
        for _ in range(3):
            assert await manager.said() == {"WATCHDOG": "1"}
        daemon.kill(signal.SIGTERM)
        while (told := await manager.said()) == {"WATCHDOG": "1"}:
            pass
        assert told == {"STOPPING": "1"}
        assert await daemon.ended() == 0


async def test_a_loop_that_stands_still_feeds_no_watchdog(
    manager: Manager, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(run_directory / "notify.sock"))
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    systemd.watch()
    assert await manager.said() == {"WATCHDOG": "1"}
    assert await manager.said() == {"WATCHDOG": "1"}
    # Another process's watchdog is not this one's to feed.
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd._watchdog_s() is None


async def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"zfabric-test-{os.getpid()}"
    manager = Manager(f"\0{name}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    systemd.notify(READY=1, STATUS="a b")
    assert await manager.said() == {"READY": "1", "STATUS": "a b"}
    manager.close()


def test_nobody_has_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    systemd.notify(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify.sock")
    systemd.notify(READY=1)


def _settings(unit: Path) -> dict[str, list[str]]:
    """All settings of a unit; one may stand more than once."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_bounded_and_hardened(unit: Path) -> None:
    configparser.ConfigParser(strict=False, interpolation=None).read(unit)
    settings = _settings(unit)
    assert settings["Type"] == ["notify"]
    for name in ("MemoryMax", "LimitNOFILE", "WatchdogSec", "NoNewPrivileges", "ProtectSystem", "User", "Restart"):
        assert settings[name], name
    command, *arguments = shlex.split(settings["ExecStart"][0])
    name = Path(command).name
    seconds = re.fullmatch(r"(\d+)s", settings["TimeoutStopSec"][0])
    assert seconds is not None
    assert int(seconds[1]) > DRAIN_S[name]
    given = [argument.replace("%S", "/s").replace("%H", "h").replace("%i", "i") for argument in arguments]
    _, bound, _ = BUILDERS[name](given).parse_args(given, print_error=False, exit_on_error=False)
    assert bound.arguments


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_itself_has_nothing_to_say_of_them(tmp_path: Path) -> None:
    for unit in UNITS:
        here = unit.read_text().replace("/opt/zfabric/bin", str(Path(sys.executable).parent))
        (tmp_path / unit.name).write_text(here)
    command = ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
