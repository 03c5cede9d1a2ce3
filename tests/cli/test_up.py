"""zfabric up: a fleet's file, and its processes while they run, die, change and end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from tests.document.commands import blocks_of
from tests.document.pages import ROOT
from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.cli import main
from zfabric.cli.children import Command
from zfabric.cli.fleet import Plan, flags_of
from zfabric.cli.supervise import Supervisor
from zfabric.errors import ConfigurationError, FabricError
from zfabric.fleet.config import load

FILES = [block.body for block in blocks_of(ROOT / "docs" / "fleet.md") if block.language == "toml"]
SHOWN = FILES[0]
ECHO = "[workers.echo.settings]\nbackend = 'echo'\n"


def written(directory: Path, text: str) -> Path:
    path = directory / "fleet.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "controller: the fleet has no process"),
        ("[fleet]\nendpont = 'x'\n[controller]", 'fleet: Object contains unknown field "endpont"'),
        ("[workers.a]\n[workers.b]\nreplicas = -1", 'workers.b.replicas: Expected "int" >= 0'),
        ("[workers.a]\nreplicas = 'two'", 'workers.a.replicas: Expected "int | null", got "str"'),
        ("[workers.'a b']", 'workers: Expected "str" matching regex'),
        ("[workers.a]\nreplicas = 2\ndevices = ['0']", "workers.a.devices: it names devices of 1 replicas"),
        ("[workers.a.settings]\nname = 'x'", "workers.a.settings.name: this is said for the whole fleet"),
        ("[gateway]\nlog_level = 'info'", "gateway.log_level: this is said for the whole fleet"),
        ("[workers.a.scale]\nmodel = 'm'", 'workers.a.scale: Object missing required field "max"'),
        ("[workers.a.scale]\nmodel = 'm'\nmax = 0", "workers.a.scale: max is 0, it must be at least 1"),
        ("[workers.a]\nreplicas = 2\nscale = { model = 'm', max = 2 }", "workers.a.replicas: scale says how many"),
        (
            "[workers.a]\nscale = { model = 'm', max = 2 }\n[workers.b]\nscale = { model = 'm', max = 2 }",
            "workers.a.scale.model: two groups have rules for 'm'",
        ),
        ("[controller", "cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(written(tmp_path, text))
    assert told in caught.value.message
    assert str(tmp_path / "fleet.toml") in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[controller]\npolicy = 'fastest'", "controller: policy 'fastest' is not one of"),
        ("[controller]\nqueue_depth = 3", "controller: Unknown option: --queue-depth."),
        ("[gateway]\nport = 'http'", "gateway.port: "),
        (f"{ECHO}slots = 'many'", "workers.echo.settings.slots: "),
        (f"{ECHO}context_length = [1, {{}}]", "context_length: it must be text, a number"),
        (f"{ECHO}[fleet]\nlogs = 'nowhere'", "fleet.logs: nowhere is no directory"),
        (f"{ECHO}[fleet]\nendpoint = 'http://x'", "http://x"),
    ],
)
def test_what_the_programs_would_not_take_is_told_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    assert main.main(["up", str(written(tmp_path, text)), "--check"]) == 2
    assert told in capfd.readouterr().err


def test_the_page_s_files_can_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    told = []
    for text in FILES:
        assert main.main(["up", str(written(tmp_path, text)), "--check"]) == 0
        told.append(capfd.readouterr().out.partition("can be used: ")[2].strip())
    assert told[:2] == ["controller, echo-1, echo-2, gateway", "controller"]
    assert len(told) == 3


def test_a_replica_has_its_name_its_devices_and_its_settings(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "[fleet]\nprefix = 'a.'\nlogs = 'logs'\n[workers.big]\nreplicas = 2\ndevices = ['0,1', '2,3']\n"
        "arguments = ['--tensor-parallel-size', '2']\nenvironment = { HF_HOME = '/m' }\n"
        "[workers.big.settings]\nbackend = 'vllm'\nslots = 8\n",
    )
    first, second = Plan(load(path), tmp_path).workers()
    assert (first.name, second.name) == ("a.big-1", "a.big-2")
    assert second.environment == {"HF_HOME": "/m", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert first.log == tmp_path / "logs" / "a.big-1.log"
    assert first.arguments[-8:] == (
        "--name", "a.big-1", "--backend", "vllm", "--slots", "8", "--tensor-parallel-size", "2",
    )  # fmt: skip
    assert flags_of({"beats": False, "uvloop": True, "speed": 0.5}) == ["--no-beats", "--uvloop", "--speed", "0.5"]


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until something holds."""
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.02)


def running(pids: list[int]) -> list[int]:
    """Those of them that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def by_worker(of: Process) -> dict[str, psutil.Process]:
    """The workers' processes by their names."""
    found: dict[str, psutil.Process] = {}
    for child in psutil.Process(of.process.pid).children():
        # One that has ended just now has no command line.
        with contextlib.suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if "--name" in line:
                found[line[line.index("--name") + 1]] = child
    return found


async def test_workers_come_back_follow_load_and_file_and_a_stop_loses_no_request(
    ipc: str, run_directory: Path
) -> None:
    text = SHOWN.partition("[workers")[0].replace("[fleet]", f"[fleet]\nendpoint = '{ipc}'").replace("8000", "0")
    head = text.replace("[controller]", "[controller]\nrecovery_ms = 0") + ECHO + "slots = 2\ntokens_per_second = 40\n"
    rule = "[workers.lazy.scale]\nmodel = 'lazy'\nmin = 0\nmax = 2\nidle_s = 0\nsettle_s = 0\n"
    path = written(run_directory, head + rule + ECHO.replace(".echo", ".lazy") + "model_names = ['lazy']\n")
    (run_directory / "logs").mkdir()
    async with processes(run_directory) as children, AsyncClient(ipc) as client:
        up = await Process.start("zfabric.cli.main", "up", str(path), directory=run_directory)
        children.append(up)
        told = await up.ready()
        assert told.endswith("processes=3")
        assert "url=http://127.0.0.1:" in told
        former = by_worker(up)
        assert set(former) == {"echo-1"}

        former["echo-1"].kill()

        async def is_back() -> bool:
            rows = {row.name: row.state for row in await client.workers()}
            new = by_worker(up).get("echo-1", former["echo-1"])
            return new.pid != former["echo-1"].pid and rows.get("echo-1") == "ready"

        await until(is_back)
        assert (await client.generate("echo", "hello", max_new_tokens=1)).text.startswith("hello")

        # The first request starts a worker, which drains when nothing is asked any more.
        assert (await client.generate("lazy", "hello", timeout=60)).text.startswith("hello")

        async def has_gone() -> bool:
            return {row.name for row in await client.workers()} == set(by_worker(up)) == {"echo-1"}

        await until(has_gone)
        assert [(row.desired, row.ready) for row in await client.scaling()] == [(0, 0)]

        before = by_worker(up)
        written(run_directory, head + ECHO.replace(".echo", ".other") + "model_names = ['other']\n")
        up.kill(signal.SIGHUP)

        async def has_changed() -> bool:
            return {row.name for row in await client.workers()} == {"echo-1", "other-1"}

        await until(has_changed)
        assert by_worker(up)["echo-1"].pid == before["echo-1"].pid
        written(run_directory, "[controller")
        up.kill(signal.SIGHUP)

        async def is_told() -> bool:
            return '"event": "fleet_kept"' in up.log.read_text()

        await until(is_told)
        theirs = [child.pid for child in psutil.Process(up.process.pid).children()]
        assert len(running(theirs)) == 4
        answers = [asyncio.create_task(client.generate("echo", "a b c d", max_new_tokens=8)) for _ in range(4)]

        async def all_are_there() -> bool:
            status = await client.status()
            return status.in_flight + status.queued == 4 or any(answer.done() for answer in answers)

        await until(all_are_there)
        up.kill(signal.SIGTERM)
        assert [(await answer).text for answer in answers] == ["a b c d a b c d "] * 4
        assert await up.ended(60) == 0
        assert running(theirs) == []
        assert {file.name for file in (run_directory / "logs").iterdir()} == {
            "controller.log", "echo-1.log", "gateway.log", "lazy-1.log", "other-1.log",
        }  # fmt: skip


#: A child that is ready at once, says which process it has started itself, and waits; and what keeps one going, itself as a
#: process.
_CHILD = """
import subprocess, sys, time
print(subprocess.Popen(["sleep", "600"]).pid, file=sys.stderr)
print("ready", flush=True)
time.sleep(600)
"""
_PARENT = """
import asyncio, sys
from pathlib import Path
from zfabric.cli.children import Command
from zfabric.cli.supervise import Supervisor

async def main():
    supervisor = Supervisor(lambda event, **fields: print(event, fields["pid"], flush=True), 1)
    await supervisor.add(Command(name="a", module="child", directory=Path(sys.argv[1]), prefixed=True))
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_children_die_with_a_supervisor_that_is_killed(run_directory: Path) -> None:
    (run_directory / "child.py").write_text(_CHILD)
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, str(run_directory),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert made.stdout is not None
    assert made.stderr is not None
    event, pid = (await made.stdout.readline()).split()
    assert event == b"child_ready"
    mark, _, grandchild = (await made.stderr.readline()).partition(b" | ")
    assert mark == b"a"
    both = [int(pid), int(grandchild)]
    assert running(both) == both
    made.kill()
    await until(lambda: _true(running(both) == []))
    # The pipes end with both.
    assert (await made.communicate()) == (b"", b"")


async def test_what_ends_before_it_is_ready_is_told_and_ended_children_leave_nothing(run_directory: Path) -> None:
    """A child that ends at once takes with it what it had started, and what still holds its output keeps nobody waiting."""
    kept = run_directory / "left.pid"
    (run_directory / "leaver.py").write_text(
        "import pathlib, subprocess\n"
        f"pathlib.Path({str(kept)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "raise SystemExit(3)\n"
    )
    supervisor = Supervisor(lambda *_, **__: None, 1)
    with pytest.raises(FabricError, match="the leaver ended with code 3 before it was ready"):
        await supervisor.add(Command(name="leaver", module="leaver", directory=run_directory))
    await until(lambda: _true(running([int(kept.read_text())]) == []))
    await supervisor.stop()


async def _true(value: bool) -> bool:
    return value
