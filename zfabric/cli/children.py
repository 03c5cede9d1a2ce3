"""One process that belongs to this one: started, listened to, ended, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from zfabric.cli import tied
from zfabric.cli.systemd import SOCKET_VARIABLE
from zfabric.errors import ConfigurationError
from zfabric.fleet.limits import CHILD_FORCED_MS, CHILD_OUTPUT_MS, CHILD_READ_BYTES


@functools.cache
def _lifeline() -> int:
    """The end that children read of a pipe whose other end lives as long as this process, and is inherited by none of them."""
    theirs, _ = os.pipe()
    return theirs


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the project as a process. Two that are equal need no restart.

    Attributes:
        name: What it is, for logs.
        module: What `python -m` runs.
        arguments: Its command line.
        environment: Variables that it has beside this process's own.
        directory: Where it runs; here by default.
        log: The file that its standard error is appended to.
        prefixed: Without a file, its standard error becomes this process's, line for line behind its name.
        stage: Those of the lowest stage end first.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None
    log: Path | None = None
    prefixed: bool = False
    stage: int = 0


class Child:
    """A command as a process, or as one after the other."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._process: asyncio.subprocess.Process | None = None
        self._output: list[asyncio.Task[None]] = []
        self._drains = False
        self._told: dict[str, str] | None = None
        #: The last line that its latest process wrote to standard error, where that is passed on.
        self.last_line = ""

    @property
    def name(self) -> str:
        """What it is, for logs."""
        return self.command.name

    @property
    def pid(self) -> int:
        """Of its latest process; 0 before the first."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_ready(self) -> bool:
        """Whether its latest process has said so, and runs."""
        return self.told is not None

    @property
    def told(self) -> dict[str, str] | None:
        """What its latest process told when it was ready; None before, and when it has ended."""
        return self._told if self._process is not None and self._process.returncode is None else None

    async def start(self) -> dict[str, str]:
        """Start it, and wait until it says that it is ready. Returns what it tells then.

        Raises:
            ConfigurationError: It ended instead; its reason stands on its standard error.
        """
        told: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._drains, self._told = False, None
        process = await self._spawn(told)
        if self._drains:
            # It was to end while it was being started.
            self.send_signal(signal.SIGTERM)
        ending = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((told, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
        if told.done():
            self._told = told.result()
            return told.result()
        await self._clear()
        code = process.returncode
        raise ConfigurationError(f"the {self.name} ended with code {code} before it was ready", code=code)

    async def _spawn(self, told: asyncio.Future[dict[str, str]]) -> asyncio.subprocess.Process:
        """Start the process, with its standard output at a pipe, and its standard error where the command wants it.

        The pipes are this module's own: asyncio would take a process for running as long as somebody else, such as a process
        that it started itself, holds its end of one.
        """
        command = self.command
        line = [sys.executable, "-I", "-S", tied.__file__, str(_lifeline())]
        line += [sys.executable, "-m", command.module, *command.arguments]
        with contextlib.ExitStack() as ours:
            output = _Pipe(ours)
            errors = _Pipe(ours) if command.prefixed and command.log is None else None
            file: IO[bytes] | None = None
            if command.log is not None:
                file = ours.enter_context(command.log.open("ab", buffering=0))
            # A session of its own: Ctrl-C goes to the parent alone, which ends the children in order.
            self._process = process = await asyncio.create_subprocess_exec(
                *line,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.theirs,
                stderr=file if errors is None else errors.theirs,
                start_new_session=True,
                pass_fds=(_lifeline(),),
                cwd=command.directory,
                env=_environment(command.environment),
            )
        self._output = [asyncio.create_task(_await_ready(output, told), name=f"output-{self.name}")]
        if errors is not None:
            self._output.append(asyncio.create_task(self._pass_on(errors), name=f"errors-{self.name}"))
        return process

    async def _pass_on(self, errors: _Pipe) -> None:
        """Write its lines to standard error, behind its name."""
        mark = f"{self.name} | ".encode()
        async for line in errors.lines():
            self.last_line = line.decode(errors="replace") if line.strip() else self.last_line
            # Whoever read ours may be gone; that is no reason to stop.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(mark + line + b"\n")
                sys.stderr.buffer.flush()

    async def ended(self) -> int:
        """Wait for its end. Returns its exit code."""
        assert self._process is not None
        code = await self._process.wait()
        await self._clear()
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, limit_s: float) -> None:
        """Have it drain; after the limit it is told to end at once, and if that does not help either, it is killed.

        One that drains already goes on doing so: its second SIGTERM is the one that does not wait.
        """
        drains, self._drains = self._drains, True
        process = self._process
        if process is None:
            return
        for number, patience_s in (
            (None if drains else signal.SIGTERM, limit_s),
            (signal.SIGTERM, CHILD_FORCED_MS / 1_000),
            (signal.SIGKILL, None),
        ):
            if number is not None:
                self.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await process.wait()
                    break
        await self._clear()

    async def _clear(self) -> None:
        """End what an ended process has started itself and left, and its watcher, and read the rest of its output."""
        output, self._output = self._output, []
        if not output:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _, waiting = await asyncio.wait(output, timeout=CHILD_OUTPUT_MS / 1_000)
        for task in waiting:
            task.cancel()


class _Pipe:
    """A pipe from a child. Args: ours: Closes the child's end here, when it has been started."""

    def __init__(self, ours: contextlib.ExitStack) -> None:
        self._mine, self.theirs = os.pipe()
        ours.callback(os.close, self.theirs)

    async def lines(self) -> AsyncIterator[bytes]:
        """What comes, a line at a time; of a line without end, pieces of it."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._mine, "rb", buffering=0)
        )
        rest = b""
        try:
            while piece := await reader.read(CHILD_READ_BYTES):
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    yield line
                if len(rest) >= CHILD_READ_BYTES:
                    yield rest
                    rest = b""
            if rest:
                yield rest
        finally:
            transport.close()


async def _await_ready(output: _Pipe, told: asyncio.Future[dict[str, str]]) -> None:
    """Look for the line that says it is ready; what else comes there is nobody's."""
    async for line in output.lines():
        if line.startswith(b"ready") and not told.done():
            told.set_result(dict(word.partition("=")[::2] for word in line.decode(errors="replace").split()[1:]))


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """A child's: when the service is ready is this process's to say."""
    return {**{name: value for name, value in os.environ.items() if name != SOCKET_VARIABLE}, **more}
