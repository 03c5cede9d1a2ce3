"""How the daemons begin and end, as real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.cli.logs import events, make_logger
from zfabric.limits import COLLECTED_OBJECTS

ROOT = Path(__file__).resolve().parents[2]
CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"


def logged(process: Process) -> list[dict[str, Any]]:
    """The log, every line of which has to be JSON."""
    return [json.loads(line) for line in process.log.read_text().splitlines()]


async def line_with(process: Process, event: str) -> None:
    """Wait until the log has it: a daemon that is not ready yet says nothing elsewhere."""
    async with asyncio.timeout(30):
        while event not in process.log.read_text():
            await asyncio.sleep(0.02)


def test_what_is_loaded_is_left_alone_by_the_garbage_collector() -> None:
    program = (
        "import gc; from zfabric.cli.daemon import ready; ready(); print(gc.get_freeze_count(), *gc.get_threshold())"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    frozen, young, *_ = (int(word) for word in output.split()[1:])
    assert frozen > 10_000
    assert young == COLLECTED_OBJECTS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_with_zero_and_leaves_no_socket(
    ipc: str, run_directory: Path, number: signal.Signals
) -> None:
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(controller)
        assert await controller.ready() == f"ready endpoint={ipc}"
        controller.kill(number)
        assert await controller.ended() == 0
        told = [line["event"] for line in logged(controller)]
        assert [event for event in told if event != "file_limit_low"] == ["listening", "draining", "drained"]
        with socket.socket(socket.AF_UNIX) as caller, pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            caller.connect(ipc.removeprefix("ipc://"))


async def test_a_worker_without_a_controller_ends_at_once(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        worker = await Process.start(WORKER, "--endpoint", ipc, directory=run_directory)
        children.append(worker)
        await line_with(worker, "loading")
        worker.kill(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_a_model_that_still_loads_does_not_keep_a_worker_alive(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        worker = await Process.start(
            WORKER, "--endpoint", ipc, "--backend", "tests.cli.backends:Endless", "--close-ms", "100",
            directory=run_directory,
        )  # fmt: skip
        children.append(worker)
        await line_with(worker, "loading")
        worker.kill(signal.SIGTERM)
        assert await worker.ended() == 0
        assert logged(worker)[-1]["event"] == "close_limit_reached"
        assert logged(worker)[-1]["level"] == "warning"


async def test_a_second_signal_ends_at_once(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        worker = await Process.start(
            WORKER, "--endpoint", ipc, "--backend", "tests.cli.backends:Endless", "--close-ms", "600000",
            directory=run_directory,
        )  # fmt: skip
        children.append(worker)
        await line_with(worker, "loading")
        worker.kill(signal.SIGINT)
        # Equal signals that are pending at once are one; a different one is another.
        worker.kill(signal.SIGTERM)
        assert await worker.ended() in (128 + signal.SIGTERM, 128 + signal.SIGINT)


async def test_what_fails_is_logged_once(ipc: str, run_directory: Path) -> None:
    worker = await Process.start(
        WORKER, "--endpoint", ipc, "--backend", "tests.cli.backends:Broken", directory=run_directory
    )
    assert await worker.ended() == 1
    failures = [line for line in logged(worker) if line["level"] == "error"]
    assert [line["event"] for line in failures] == ["failed"]
    assert "ZeroDivisionError: the file has no weights" in failures[0]["exception"]


async def test_a_module_that_is_missing_is_named(ipc: str, run_directory: Path) -> None:
    worker = await Process.start(
        WORKER, "--endpoint", ipc, "--backend", "tests.cli.backends:Lacking", directory=run_directory
    )
    assert await worker.ended() == 2
    last = worker.log.read_text().splitlines()[-1]
    assert last.startswith("error 40010:")
    assert "an_engine_that_is_not_installed" in last


@pytest.mark.parametrize("uvloop", ["--uvloop", "--no-uvloop"])
async def test_both_event_loops(ipc: str, run_directory: Path, uvloop: str) -> None:
    async with processes(run_directory) as children:
        for module, ready in ((CONTROLLER, f"ready endpoint={ipc}"), (WORKER, "ready worker=w models=echo")):
            name = ("--name", "w") if module == WORKER else ()
            child = await Process.start(module, "--endpoint", ipc, uvloop, *name, directory=run_directory)
            children.append(child)
            assert await child.ready() == ready
        for child in reversed(children):
            child.kill(signal.SIGTERM)
            assert await child.ended() == 0


def test_events_have_levels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write = events(make_logger("worker", "warning", "json"))
    for event in ("registered", "disconnected", "engine_died"):
        write(event, endpoint="ipc://x")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("disconnected", "warning"), ("engine_died", "error")]


def test_a_person_reads_words_instead_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events(make_logger("controller", "info", "console"))("listening", files=3)
    text = capsys.readouterr().err
    assert "listening" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.parametrize("name", ["zfabric", "zfabric-controller", "zfabric-worker"])
def test_scripts_of_the_checkout_run_from_anywhere(name: str, tmp_path: Path) -> None:
    link = tmp_path / name
    link.symlink_to(ROOT / "bin" / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [link, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    assert done.stdout.startswith("0.")


def test_scripts_of_a_bare_checkout_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "zfabric"
    script.write_bytes((ROOT / "bin" / "zfabric").read_bytes())
    script.chmod(0o755)
    nothing = tmp_path / "python3"
    nothing.write_text("#!/bin/sh\nexit 1\n")
    nothing.chmod(0o755)
    done = subprocess.run(
        [script, "models"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 2
    assert f"make -C {tmp_path} venv" in done.stderr


async def test_a_controller_tells_who_came_and_who_went(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(controller)
        await controller.ready()
        worker = await Process.start(
            WORKER, "--backend", "echo", "--endpoint", ipc, "--name", "w", directory=run_directory
        )
        children.append(worker)
        await worker.ready()
        async with AsyncClient(ipc, label="the test") as client:
            stream = client.stream("echo", "one two")
            await stream
        worker.kill(signal.SIGKILL)
        await line_with(controller, "worker_lost")
        lines = [line for line in logged(controller) if line["event"].startswith(("client_", "worker_"))]
        told = [(line["event"], line["level"], line.get("worker") or line.get("client")) for line in lines]
        assert told == [
            ("worker_registered", "info", "w"),
            ("client_registered", "info", "client the test"),
            ("client_left", "info", "client the test"),
            ("worker_lost", "warning", "w"),
        ]


async def test_daemons_that_look_instead_of_sleeping_serve_and_end_as_others_do(
    ipc: str, run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZFABRIC_SPIN_US", "100")
    async with processes(run_directory) as children:
        for module, *more in ((CONTROLLER, "--spin-us", "50"), (WORKER, "--name", "w")):
            child = await Process.start(module, "--endpoint", ipc, *more, directory=run_directory)
            children.append(child)
            await child.ready()
        async with AsyncClient(ipc, spin_us=100) as client:
            assert (await client.generate("echo", "hello", max_new_tokens=3)).text == "hello hello hello "
        for child in reversed(children):
            child.kill(signal.SIGTERM)
            assert await child.ended() == 0


async def test_a_daemon_says_what_it_may_be_told_to_spin(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        for module, wrong in ((CONTROLLER, ("10001",)), (WORKER, ("50", "--transport", "libzmq"))):
            child = await Process.start(module, "--endpoint", ipc, "--spin-us", *wrong, directory=run_directory)
            children.append(child)
            assert await child.ended() == 2
            told = child.log.read_text()
            assert "0 … 10000" in told if module is CONTROLLER else "use transport loop, or 0" in told
