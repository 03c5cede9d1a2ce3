"""zfabric serve: three processes from one command, and none of them left."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.fabric import Process, processes
from zfabric.cli import main
from zfabric.models.wheels import prepare

MAIN = "zfabric.cli.main"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_it_prints_works_and_a_signal_ends_all(
    ipc: str, run_directory: Path, number: signal.Signals
) -> None:
    async with processes(run_directory) as children:
        made = await Process.start(MAIN, "serve", "echo", "--endpoint", ipc, "--port", "0", directory=run_directory)
        children.append(made)
        ready = dict(word.partition("=")[::2] for word in (await made.ready()).split()[1:])
        assert ready["models"] == "echo"
        assert made.process.stdout is not None
        line = (await made.process.stdout.readline()).decode()
        assert line.startswith(f"try: curl {ready['url']}/chat/completions ")
        curl = await asyncio.create_subprocess_shell(
            line.removeprefix("try: ").replace("curl ", "curl -s ", 1), stdout=asyncio.subprocess.PIPE
        )
        answer = json.loads((await curl.communicate())[0])
        assert answer["choices"][0]["message"]["content"] == "What is the capital of France? " * 8
        theirs = psutil.Process(made.process.pid).children()
        assert len(theirs) == 3
        made.kill(number)
        assert await made.ended() == 0
        assert [one for one in theirs if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


async def test_a_signal_while_a_model_loads_ends_all(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        made = await Process.start(
            MAIN, "serve", str(prepare("smollm2")), "--endpoint", ipc, "--port", "0", "--log-level", "info",
            directory=run_directory,
        )  # fmt: skip
        children.append(made)
        async with asyncio.timeout(30):
            while "loading" not in made.log.read_text():
                await asyncio.sleep(0.02)
        theirs = psutil.Process(made.process.pid).children()
        made.kill(signal.SIGTERM)
        assert await made.ended(40) == 0
        assert [one for one in theirs if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def test_a_model_that_is_none_is_told(ipc: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "/no/such/model", "--endpoint", ipc, "--port", "0"]) == 2
    told = capfd.readouterr().err
    assert "/no/such/model" in told
    assert "the worker-1 ended with code" in told
