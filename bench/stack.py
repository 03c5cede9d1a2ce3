"""One system under load: its processes, its driver, and what each of them spent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from bench import cores

ROOT: Final = Path(__file__).resolve().parent.parent
_START_S: Final = 60.0


class StackError(RuntimeError):
    """A system did not start, or a job failed in it."""


@dataclass(frozen=True)
class Part:
    """One process of a system.

    Attributes:
        role: What it is to the system; CPU time is told by role.
        command: What to run.
        ready: "line" for a first line on its standard output that begins with "ready", else a URL that answers 200, or
            host:port that accepts connections.
        environment: Added to the suite's own.
    """

    role: str
    command: tuple[str, ...]
    ready: str = "line"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a job gave.

    Attributes:
        samples: In microseconds; see `bench.drive`.
        wall_s: Time of the job.
        count: Requests, or tokens.
        cpu_s: CPU time by role, the driver's as "client".
        firsts: Times to the first token of a paced job, in microseconds.
        wire_bytes: What went over the loopback meanwhile, with the headers of TCP and IP, on all hops together; 0 where
            the system does not tell.
    """

    samples: list[float]
    wall_s: float
    count: int
    cpu_s: dict[str, float]
    firsts: list[float] = field(default_factory=list)
    wire_bytes: int = 0

    @property
    def rate(self) -> float:
        """Requests or tokens a second."""
        return self.count / self.wall_s

    def cpu_us(self, role: str) -> float:
        """Microseconds of CPU a request or token."""
        return self.cpu_s.get(role, 0.0) / self.count * 1e6


class Stack:
    """A running system. Use as an async context manager.

    Args:
        parts: Started in order, each when the one before is ready.
        adapter: Client module in `bench.adapters`.
        target: What the client connects to.
        python: The interpreter that the client runs in.
        environment: Added to the client's.
        scratch: A directory of its files, such as keys, which goes when it ends.
        pages: Where its processes serve metrics.
    """

    def __init__(
        self,
        parts: list[Part],
        adapter: str,
        target: str,
        python: Path,
        environment: Mapping[str, str] | None = None,
        scratch: Path | None = None,
        pages: Sequence[str] = (),
    ) -> None:
        self.pages = tuple(pages)
        self._environment = environment or {}
        self._scratch = scratch
        self._parts = parts
        self._adapter, self._target, self._python = adapter, target, python
        self._directory = Path(tempfile.mkdtemp(prefix="zf-bench-"))
        roles = [part.role for part in parts] + ["client"] * bool(adapter)
        self._cores = dict(zip(roles, cores.shares(cores.usable(), len(roles)), strict=False))
        self._driver: asyncio.subprocess.Process | None = None
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def __aenter__(self) -> Stack:
        try:
            for part in self._parts:
                await self._start(part)
            if self._adapter:
                command = (str(self._python), "-m", "bench.drive", self._adapter, self._target)
                self._driver = await self._spawn("client", command, self._environment)
                await self._line(self._driver, "client")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        alive = [*self.processes.values(), *([self._driver] if self._driver else [])]
        for member in [member for process in alive for member in _family(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGCONT)
                member.kill()
        for process in alive:
            await process.wait()
        for directory in (self._directory, self._scratch):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    async def run(self, job: str, **parameters: Any) -> Outcome:
        """Have the driver do a job. Raises: StackError."""
        if self._driver is None or self._driver.stdin is None:
            raise StackError("this system has no driver")
        before, wire_before = self.cpu(), _loopback_bytes()
        self._driver.stdin.write(json.dumps({"job": job, **parameters}).encode() + b"\n")
        await self._driver.stdin.drain()
        answer = await self._line(self._driver, "client", limit_s=150)
        after, wire_after = self.cpu(), _loopback_bytes()
        if "error" in answer:
            raise StackError(f"{job}: {answer['error']}")
        cpu_s = {role: after[role] - before[role] for role in after}
        cpu_s["client"] = answer["cpu_s"]
        count = answer.get("tokens", answer.get("requests", 0))
        firsts = answer.get("firsts", [])
        return Outcome(answer["samples"], answer["wall_s"], count, cpu_s, firsts, wire_after - wire_before)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by role, without the client's."""
        return {role: cpu_s(process.pid) for role, process in self.processes.items()}

    def kill(self, role: str) -> None:
        """SIGKILL to a part and its children, or to the client."""
        process = self._driver if role == "client" else self.processes[role]
        assert process is not None
        for member in _family(process.pid):
            member.kill()

    async def restart(self, role: str) -> None:
        """Start a part that was killed again, and wait until it is ready."""
        await self.processes[role].wait()
        await self._start(next(part for part in self._parts if part.role == role))

    async def tell(self, role: str, line: str) -> str:
        """Write a line to a part's standard input and wait for its answer. Raises: StackError."""
        process = self.processes[role]
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")
        return str(await self._line(process, role))

    def memory_bytes(self, role: str) -> int:
        """Resident memory of a part and its children."""
        total = 0
        for process in _family(self.processes[role].pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    async def _start(self, part: Part) -> None:
        process = await self._spawn(part.role, part.command, part.environment)
        self.processes[part.role] = process
        if part.ready == "line":
            await self._line(process, part.role)
            return
        for _ in range(int(_START_S / 0.05)):
            if process.returncode is not None:
                raise StackError(f"{part.role} ended with {process.returncode}: {self._tail(part.role)}")
            if await asyncio.to_thread(_answers, part.ready):
                return
            await asyncio.sleep(0.05)
        raise StackError(f"{part.role} is not ready after {_START_S:.0f} s: {self._tail(part.role)}")

    async def _spawn(
        self, role: str, command: tuple[str, ...], environment: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        with (self._directory / f"{role}.log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if role == "client" or environment.get("QUIET") != "1" else log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                limit=1 << 27,
            )
        cores.pin(process.pid, self._cores.get(role, ()))
        return process

    async def _line(self, process: asyncio.subprocess.Process, role: str, limit_s: float = _START_S) -> Any:
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), limit_s)
        except TimeoutError:
            raise StackError(f"{role} says nothing for {limit_s:.0f} s: {self._tail(role)}") from None
        if not line:
            raise StackError(f"{role} ended: {self._tail(role)}")
        return json.loads(line) if role == "client" else line.decode().strip()

    def _tail(self, role: str) -> str:
        text = (self._directory / f"{role}.log").read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it wrote no log"


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its children have spent, system calls included."""
    return sum(_cpu_s(process) for process in _family(pid))


def _cpu_s(process: psutil.Process) -> float:
    if sys.platform == "linux":
        # The kernel's clock of another process, in nanoseconds; its accounting in /proc has a grain of 10 ms.
        with contextlib.suppress(OSError):
            return time.clock_gettime((~process.pid << 3) | 2)
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _loopback_bytes() -> int:
    """All that the loopback has carried so far. Systems take turns, so what it carries during a job is the job's."""
    known = psutil.net_io_counters(pernic=True)
    return sum(known[name].bytes_sent for name in ("lo", "lo0") if name in known)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _answers(ready: str) -> bool:
    if not ready.startswith("http"):
        host, _, port = ready.partition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False
    try:
        with urllib.request.urlopen(ready, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def own_python() -> Path:
    """The interpreter of the suite, which has zfabric."""
    return Path(sys.executable)
