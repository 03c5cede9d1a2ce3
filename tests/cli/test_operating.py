"""Operators' commands against a fabric in this process, and every command that docs/operating.md shows of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fabric import Fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.cli.main import client_commands, main
from zfabric.errors import StoppedByOperatorError
from zfabric.transport.curve import create_keys

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text()
SHOWN = re.findall(r"^\$ zfabric (.*)$", PAGE, re.MULTILINE)


@pytest.fixture
async def served(ipc: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fabric]:
    """A worker gpu-1 of one slot, whose model smollm2 says a token every 20 ms."""
    monkeypatch.setenv("ZFABRIC_ENDPOINT", ipc)
    monkeypatch.setenv("COLUMNS", "300")
    async with fabric(ipc) as made:
        options = EchoOptions(model_names=("smollm2",), tokens_per_second=50)
        await made.add_worker("gpu-1", EchoWorker(options), slots=1)
        yield made


@contextlib.asynccontextmanager
async def two_requests(served: Fabric) -> AsyncIterator[list[asyncio.Task[object]]]:
    """One that runs and one that waits, of a client backend-1."""
    async with AsyncClient(served.endpoint, label="backend-1") as client:
        running = client.stream("smollm2", "a b", max_new_tokens=100_000)
        await anext(running)

        async def read() -> object:
            return [delta async for delta in running]

        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(read()),
            asyncio.create_task(client.generate("smollm2", "c", max_new_tokens=1)),
        ]
        while not (await client.queue()).rows:
            pass
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def zfabric(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command beside the fabric's loop. Returns its exit code, output and errors."""
    capsys.readouterr()
    code = await asyncio.to_thread(main, arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


async def test_lists_show_who_waits_and_why(served: Fabric, capsys: pytest.CaptureFixture[str]) -> None:
    async with two_requests(served):
        code, output, _ = await zfabric(capsys, "requests", "--json")
        found = json.loads(output)
        assert (code, found["total"], found["left_out"]) == (0, 2, 0)
        running, waiting = found["rows"]
        assert (running["state"], running["worker"], running["client"]) == ("running", "gpu-1", "backend-1")
        assert running["units"] > 0
        assert (waiting["state"], waiting["place"], waiting["reason"]) == ("queued", 1, "slots")
        code, output, _ = await zfabric(capsys, "requests", "--state", "queued", "--limit", "0")
        assert (code, "and 1 more of 1" in output) == (0, True)
        _, output, _ = await zfabric(capsys, "queue")
        assert "all 1 slots of 1 worker are taken" in output
        _, output, _ = await zfabric(capsys, "clients", "--client", "backend-1", "--json")
        (client,) = json.loads(output)["rows"]
        assert (client["waiting"], client["running"]) == (1, 1)
        code, output, _ = await zfabric(capsys, "explain", running["request"])
        assert (code, "went to gpu-1: policy shortest_queue chose among 1" in output) == (0, True)
        _, output, _ = await zfabric(capsys, "explain", waiting["request"], "--json")
        assert [host["state"] for host in json.loads(output)["hosts"]] == ["full"]
        code, _, errors = await zfabric(capsys, "explain", "abc")
        assert (code, "no request 'abc' is here" in errors) == (1, True)
        code, _, errors = await zfabric(capsys, "requests", "--sort", "colour")
        assert (code, "'colour' is not one of age, place" in errors) == (1, True)


async def test_a_cancelled_request_and_a_kicked_client_know_who_did_it(
    served: Fabric, capsys: pytest.CaptureFixture[str]
) -> None:
    async with two_requests(served) as (running, waiting):
        _, output, _ = await zfabric(capsys, "requests", "--state", "running", "--json")
        name = json.loads(output)["rows"][0]["request"]
        code, output, _ = await zfabric(capsys, "cancel", name)
        assert (code, f"request {name} of client backend-1 is cancelled\n") == (0, output)
        with pytest.raises(StoppedByOperatorError, match=r"by operator '.*@"):
            await running
        await waiting
    async with two_requests(served) as (running, waiting):
        code, output, _ = await zfabric(capsys, "kick", "backend-1", "--refuse-ms", "0", "--json")
        assert (code, len(json.loads(output)["requests"])) == (0, 2)
        for task in (running, waiting):
            with pytest.raises(StoppedByOperatorError):
                await task


async def test_all_commands_that_the_page_shows(
    served: Fabric, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, while a request waits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zfabric.toml").write_text('[worker]\nbackend = "echo"\n')
    assert {shlex.split(line)[0] for line in SHOWN} >= {
        "queue",
        "requests",
        "drain",
        "pause",
        "config",
        "ping",
        "check",
        "doctor",
    }
    async with two_requests(served):
        for line in SHOWN:
            code, output, errors = await zfabric(capsys, *shlex.split(line))
            assert (code, errors) == (0, ""), line
            assert output or "--quiet" in line
    broker = served.controller.broker
    assert not broker.registry.directives.held
    assert not broker.registry.directives.paused
    assert (broker.config.policy, broker.registry.workers["gpu-1"].speed) == ("shortest_queue", 2.0)


async def test_ping_is_an_exit_code(served: Fabric, capsys: pytest.CaptureFixture[str]) -> None:
    assert await zfabric(capsys, "ping", "--quiet") == (0, "", "")
    code, output, _ = await zfabric(capsys, "ping", "--json")
    assert (code, json.loads(output)["workers"]) == (0, 1)
    for arguments, says in (
        (("--worker", "gpu-2"), "no worker is named 'gpu-2'"),
        (("--model", "nope"), "nope"),
        (("--endpoint", f"{served.endpoint}.not", "--timeout", "0.1"), "hint: is a controller running there?"),
    ):
        code, output, errors = await zfabric(capsys, "ping", *arguments)
        assert (code, output, says in errors) == (1, "", True)
        assert await zfabric(capsys, "ping", "--quiet", *arguments) == (1, "", "")
    await zfabric(capsys, "pause", "smollm2")
    assert (await zfabric(capsys, "ping", "--model", "smollm2"))[0] == 1
    await zfabric(capsys, "resume", "smollm2")
    await zfabric(capsys, "drain", "gpu-1", "--stay")
    assert (await zfabric(capsys, "ping", "--model", "smollm2"))[0] == 1
    assert (await zfabric(capsys, "ping", "--worker", "gpu-1"))[0] == 1
    assert (await zfabric(capsys, "ping"))[0] == 0
    await zfabric(capsys, "undrain", "gpu-1")


async def test_the_doctor_finds_what_is_not_as_it_should_be(
    served: Fabric, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def findings(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
        code, output, _ = await zfabric(capsys, "doctor", "--json", *arguments)
        return code, {finding["of"]: finding for finding in json.loads(output)}

    code, found = await findings()
    assert code == 0
    assert {of for of, it in found.items() if it["level"] == "error"} == set()
    assert found.keys() >= {
        "settings",
        "files",
        "keys",
        "endpoint",
        "controller",
        "clock",
        "workers",
        "versions",
        "queues",
    }
    served.controller.broker.wall_clock_s = lambda: 1_000.0
    served.controller.broker.registry.workers["gpu-1"].minor = 0
    await zfabric(capsys, "drain", "gpu-1", "--stay")
    code, found = await findings()
    assert code == 0
    assert found["clock"]["level"] == found["versions"]["level"] == found["worker gpu-1"]["level"] == "warning"
    assert found["worker gpu-1"]["advice"] == "zfabric undrain gpu-1"
    await zfabric(capsys, "undrain", "gpu-1")
    secret = tmp_path / "open.key_secret"
    create_keys(tmp_path, "open")
    secret.chmod(0o644)
    monkeypatch.setenv("ZFABRIC_KEY", str(secret))
    monkeypatch.setenv("ZFABRIC_CONTROLLER_KEY", str(tmp_path / "open.key"))
    code, found = await findings("--endpoint", f"{served.endpoint}.not")
    assert code == 1
    assert found["keys"]["advice"] == "chmod 0600 the secret key file"
    assert found["endpoint"]["level"] == "error"
    assert "controller" not in found
    code, found = await findings("--endpoint", f"file://{tmp_path}/endpoint")
    assert code == 1
    assert "cannot be read: [Errno 2]" in found["endpoint"]["what"]


async def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """And every question to a controller a timeout."""
    asks = {
        "models", "workers", "status", "requests", "clients", "queue", "drain", "undrain", "pause", "resume", "cancel", "kick",
        "get", "set", "ping", "doctor",
    }  # fmt: skip
    for words, _ in client_commands():
        code, output, _ = await zfabric(capsys, *words, "--help")
        assert code == 0
        if words[-1] in asks and words[0] != "ray":
            assert "--timeout" in output, words
        assert "Examples" in output or "zfabric serve" in output, words
