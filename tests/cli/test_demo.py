"""The demo: it works, and whatever happens to it, it leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


async def start(directory: Path) -> asyncio.subprocess.Process:
    """The demo on the echo backend; its sockets and logs go below the directory."""
    return await asyncio.create_subprocess_exec(
        sys.executable, DEMO, "--backend", "echo",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(directory), "ZFABRIC_WORKER_NONSENSE": "1", "ZFABRIC_WORKER_NAME": "mine"},
    )  # fmt: skip


def children_of(directory: Path) -> list[str]:
    """Processes, whoever their parent is now, that were started for this demo."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "zfabric.cli." in line and str(directory) in line:
            found.append(line)
    return found


async def test_it_shows_answers_of_both_workers(run_directory: Path) -> None:
    demo = await start(run_directory)
    output, _ = await demo.communicate()
    text = output.decode()
    assert demo.returncode == 0, text
    for part in ("ready endpoint=", "worker-1 · first token after", "worker-2 · first token after", "384 tokens in"):
        assert part in text
    assert children_of(run_directory) == []
    assert list(run_directory.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_ends_everything(run_directory: Path, number: signal.Signals) -> None:
    demo = await start(run_directory)
    assert demo.stdout is not None
    while not (await demo.stdout.readline()).startswith(b"up in"):
        assert demo.returncode is None
    assert len(children_of(run_directory)) == 3
    demo.send_signal(number)
    await demo.stdout.read()
    assert await demo.wait() == 128 + number
    assert children_of(run_directory) == []
    assert list(run_directory.iterdir()) == []
