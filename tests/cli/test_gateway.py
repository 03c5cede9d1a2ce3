"""zfabric-gateway as a process, and as several at one port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cli.test_metrics import scraped
from tests.fabric import Process, echo_fabric, processes
from zfabric.cli import gateway

GATEWAY = "zfabric.cli.gateway"


@pytest.mark.parametrize("workers", [1, 2])
async def test_it_serves_until_a_signal_and_leaves_nothing(ipc: str, run_directory: Path, workers: int) -> None:
    async with echo_fabric(ipc) as (_, _), processes(run_directory) as children:
        made = await Process.start(
            GATEWAY,
            "--endpoint",
            ipc,
            "--port",
            "0",
            "--workers",
            str(workers),
            "--metrics",
            "0",
            directory=run_directory,
        )
        children.append(made)
        ready = dict(word.partition("=")[::2] for word in (await made.ready()).split()[1:])
        processes_of = psutil.Process(made.process.pid).children(recursive=True)
        assert len(processes_of) == (workers if workers > 1 else 0)
        # Each connection may come to another process.
        for _ in range(4):
            async with httpx.AsyncClient(base_url=ready["url"]) as web:
                asked = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 3}
                answer = await web.post("/v1/chat/completions", json=asked)
                assert answer.json()["choices"][0]["message"]["content"] == "a b a "
        # Each process tells its own.
        urls = ready["metrics"].split(",")
        told = [await asyncio.to_thread(scraped, url) for url in urls]
        assert len(told) == workers
        assert sum(sum(one.get("zfabric_gateway_requests_total", {}).values()) for one in told) == 4
        made.kill(signal.SIGTERM)
        assert await made.ended() == 0
        assert [one for one in processes_of if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


async def test_one_of_several_that_dies_is_started_anew(ipc: str, run_directory: Path) -> None:
    async with echo_fabric(ipc) as (_, _), processes(run_directory) as children:
        made = await Process.start(GATEWAY, "--endpoint", ipc, "--port", "0", "--workers", "2", directory=run_directory)
        children.append(made)
        await made.ready()
        first, second = psutil.Process(made.process.pid).children()
        first.kill()
        first.wait(10)
        log = made.log
        while "child_ended" not in log.read_text():
            await asyncio.sleep(0.02)
        while len(psutil.Process(made.process.pid).children()) < 2:
            await asyncio.sleep(0.02)
        assert second.is_running()
        made.kill(signal.SIGTERM)
        assert await made.ended() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_hangup_has_all_read_their_keys(ipc: str, run_directory: Path, tmp_path: Path, workers: int) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[a]\nkey = "sk-a"\n')
    async with echo_fabric(ipc) as (_, _), processes(run_directory) as children:
        made = await Process.start(
            GATEWAY, "--endpoint", ipc, "--port", "0", "--workers", str(workers), "--api-keys", str(file),
            "--log-format", "json", directory=run_directory,
        )  # fmt: skip
        children.append(made)
        ready = dict(word.partition("=")[::2] for word in (await made.ready()).split()[1:])
        assert made.log.read_text().count('"event": "keys"') == workers
        stamp = file.stat()
        file.write_text('[b]\nkey = "sk-b"\n')
        # What looks the same is read all the same when it is asked for.
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        made.kill(signal.SIGHUP)
        async with asyncio.timeout(30):
            while made.log.read_text().count('"event": "keys"') < 2 * workers:
                await asyncio.sleep(0.02)
        for _ in range(4):
            async with httpx.AsyncClient(base_url=ready["url"]) as web:
                codes = [
                    (await web.get("/v1/models", headers={"authorization": f"Bearer sk-{name}"})).status_code
                    for name in "ab"
                ]
                assert codes == [401, 200]
        made.kill(signal.SIGTERM)
        assert await made.ended() == 0


def test_a_port_in_use_is_told(ipc: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for workers in ("1", "2"):
            assert gateway.main(["--endpoint", ipc, "--port", port, "--workers", workers]) == 1
            assert f"127.0.0.1:{port} cannot be listened at" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--workers", "0"], "workers is 0"),
        (["--body-limit", "1"], "body_limit is 1"),
        (["--tls-cert", "x.pem"], "tls_cert and tls_key go together"),
        (["--api-keys", "missing.toml"], "missing.toml cannot be read"),
        (["--cors-origin", "example.org"], "cors_origins has 'example.org'"),
        (["--endpoint", "http://x"], "http://x"),
    ],
)
def test_wrong_settings_are_told(flags: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert gateway.main(flags) == 2
    assert told in capfd.readouterr().err


def test_each_process_has_a_port_of_its_own_for_its_figures() -> None:
    assert gateway._ports("0.0.0.0:9464", 2) == [["--metrics", "0.0.0.0:9464"], ["--metrics", "0.0.0.0:9465"]]
    assert gateway._ports("0", 2) == [["--metrics", "0"]] * 2
    assert gateway._ports(None, 2) == [[], []]


def test_settings_come_from_the_file(ipc: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.toml"
    file.write_text('[gateway]\nport = 70001\n[controller]\npolicy = "lottery"\n')
    assert gateway.main(["--config", str(file), "--endpoint", ipc]) == 2
    assert "port is 70001" in capfd.readouterr().err
