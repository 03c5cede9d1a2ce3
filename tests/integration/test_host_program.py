"""The library as a guest in somebody's program: it leaves the process as it finds it, and loads where little is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fabric import Process, processes
from zfabric import limits

ROOT = Path(__file__).resolve().parents[2]

#: What a program may have set for itself.
_STATE = """
import asyncio, ctypes, gc, os, platform, resource, signal, sys, threading, warnings
def state():
    umask = os.umask(0o027)
    os.umask(umask)
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "umask": umask,
        "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "collector": [gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()],
        "switch": sys.getswitchinterval(),
        "hooks": [str(sys.excepthook), str(threading.excepthook), len(warnings.filters)],
        "recursion": sys.getrecursionlimit(),
        "environment": dict(os.environ),
        "policy": type(asyncio.get_event_loop_policy()).__name__ if sys.version_info < (3, 14) else "",
    }
"""
_USED = """
from zfabric import AsyncClient, Client
from zfabric.backends.echo import EchoWorker
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

async def use(endpoint):
    config = ControllerConfig(endpoints=(endpoint,), broker=BrokerConfig(recovery_ms=0))
    async with Controller(config) as controller:
        ready = asyncio.Event()
        service = WorkerService([EchoWorker()], WorkerConfig(endpoint=endpoint, name="w"), on_ready=lambda _: ready.set())
        task = asyncio.create_task(service.run())
        await ready.wait()
        async with AsyncClient(endpoint) as client:
            await client.generate("echo", "x", max_new_tokens=3)
        def block():
            with Client(endpoint) as client:
                client.generate("echo", "x", max_new_tokens=3)
        await asyncio.to_thread(block)
        await service.drain()
        await task
    # Nobody is there: the client tries again and again.
    async with AsyncClient(endpoint, connect_timeout_ms=200) as client:
        try:
            await client.status()
        except Exception as error:
            assert "no controller" in str(error)
"""


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="limits and masks are of POSIX")
def test_a_program_that_uses_all_three_parties_stays_as_it_was(ipc: str) -> None:
    """Its limit on files, its masks and handlers, its collector, its chance."""
    program = f"""
{_STATE}
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
library = ctypes.CDLL(None)
library.srand(42)
expected = [library.rand() for _ in range(8)]
library.srand(42)
import numpy
{_USED}
before = state()
asyncio.run(use(sys.argv[1]))
after = state()
assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
if platform.libc_ver()[0] == "glibc":
    assert [library.rand() for _ in range(8)] == expected
print("as it was")
"""
    assert _run(program, ipc) == "as it was\n"


@pytest.mark.skipif(os.name != "posix", reason="limits are of POSIX")
async def test_a_daemon_has_a_process_of_its_own(ipc: str, run_directory: Path) -> None:
    """The controller's command may have as many files open as it is allowed to, and says how many; too few are a warning."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (str(hard), "300"):
        async with processes(run_directory) as children:
            command = ("/bin/sh", "-c", f'ulimit -S -n 256 && ulimit -H -n {limit} && exec "$@"', "sh")
            child = await Process.start(
                "zfabric.cli.controller", "--endpoint", ipc, "--log-format", "json",
                directory=run_directory, prefix=command,
            )  # fmt: skip
            children.append(child)
            await child.ready()
            lines = [json.loads(line) for line in child.log.read_text().splitlines()]
            assert [line["files"] for line in lines if line["event"] == "listening"] == [int(limit)]
            low = [line["limit"] for line in lines if line["event"] == "file_limit_low"]
            assert low == ([int(limit)] if int(limit) < limits.FILE_DESCRIPTORS_MIN else [])


#: Modules of the standard library that a system has not, and names that are not in the others.
_SYSTEMS = {
    "win32": (
        "fcntl resource pwd grp termios uvloop",
        "os.geteuid os.getuid os.fork signal.SIGHUP signal.SIGPIPE signal.SIGKILL",
    ),
    "darwin": ("uvloop", ""),
}


@pytest.mark.parametrize("system", _SYSTEMS)
def test_every_module_loads_on_other_systems(system: str) -> None:
    """As far as that can be shown on this one: without what the system lacks. Engines are not asked for."""
    modules, names = _SYSTEMS[system]
    program = f"""
import asyncio, concurrent.futures, ctypes, importlib, multiprocessing, os, pkgutil, signal, subprocess, sys, tempfile
import cyclopts, msgspec, numpy, prometheus_client, rich.console, rich.table, structlog, uvicorn
import opentelemetry.exporter.otlp.proto.http.trace_exporter, opentelemetry.sdk.trace.export
import zmq, zmq.auth.thread, zmq.utils.monitor
sys.platform = {system!r}
engines = ["torch", "transformers", "tokenizers", "vllm", "httpx2", "PIL", "safetensors", "llguidance", "numba", "llvmlite"]
for name in {modules.split()!r} + engines:
    sys.modules[name] = None
for name in {names.split()!r}:
    owner, _, attribute = name.partition(".")
    if hasattr(sys.modules[owner], attribute):
        delattr(sys.modules[owner], attribute)
import zfabric
assert zfabric.limits.IPC_PATH_LENGTH_MAX == 103
loaded = ["zfabric"]
for found in pkgutil.walk_packages(zfabric.__path__, "zfabric."):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in engines, (found.name, error)
    else:
        loaded.append(found.name)
print(len(loaded))
"""
    assert int(_run(program)) > 60
