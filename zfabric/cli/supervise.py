"""Processes that belong to this one: started in order, started again when they end, and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from zfabric.cli.systemd import SOCKET_VARIABLE
from zfabric.errors import ConfigurationError
from zfabric.limits import RESTART_MAX_MS, RESTART_MIN_MS


class Child:
    """One command of the project as a process.

    Args:
        name: What it is, for logs.
        module: What `python -m` runs.
        arguments: Its command line.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str]) -> None:
        self.name = name
        self._command = (sys.executable, "-m", module, *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> dict[str, str]:
        """Start it, and wait until it says that it is ready. Returns what it tells then.

        Raises:
            ConfigurationError: It ended instead; its reason stands on standard error.
        """
        # A session of its own: Ctrl-C goes to the parent alone, which ends the children in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, start_new_session=True, env=_environment()
        )
        assert self._process.stdout is not None
        while line := (await self._process.stdout.readline()).decode():
            if line.startswith("ready"):
                return dict(word.partition("=")[::2] for word in line.split()[1:])
        code = await self._process.wait()
        raise ConfigurationError(f"the {self.name} ended with code {code} before it was ready", code=code)

    async def ended(self) -> int:
        """Wait for its end. Returns its exit code."""
        assert self._process is not None
        assert self._process.stdout is not None
        while await self._process.stdout.readline():
            pass
        return await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self, limit_s: float) -> None:
        """Have it drain; after the limit it is killed."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(limit_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()


class Supervisor:
    """Children, in the order in which they need one another.

    Args:
        log: Called with an event and its fields.
        stop_limit_s: How long each of them may drain.
    """

    def __init__(self, log: Callable[..., Any], stop_limit_s: float) -> None:
        self._log = log
        self._limit_s = stop_limit_s
        self._stopping = False
        self._children: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, child: Child) -> dict[str, str]:
        """Start a child, and keep it going. Returns what it tells when it is ready.

        Raises:
            ConfigurationError: It ended instead, or all are being stopped.
        """
        if not self._stopping:
            self._children.append(child)
            told = await child.start()
        if self._stopping:
            # It may have become ready while it was told to end.
            raise ConfigurationError(f"the {child.name} is not started: all are being stopped")
        self._tasks.append(asyncio.create_task(self._keep(child), name=f"keep-{child.name}"))
        return told

    async def stop(self) -> None:
        """End all, the last one first; nothing is started from now on."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for child in reversed(self._children):
            await child.stop(self._limit_s)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to all."""
        for child in self._children:
            child.send_signal(number)

    async def _keep(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        pause_ms = RESTART_MIN_MS
        while True:
            started = loop.time()
            code = await child.ended()
            # One that ran for a while has earned a quick start.
            lasted = loop.time() - started >= RESTART_MAX_MS / 1_000
            pause_ms = RESTART_MIN_MS if lasted else min(2 * pause_ms, RESTART_MAX_MS)
            self._log("child_ended", name=child.name, code=code, again_in_ms=pause_ms)
            await asyncio.sleep(pause_ms / 1_000)
            with contextlib.suppress(ConfigurationError):
                await child.start()


def _environment() -> dict[str, str]:
    """A child's: when the service is ready is this process's to say."""
    return {name: value for name, value in os.environ.items() if name != SOCKET_VARIABLE}
