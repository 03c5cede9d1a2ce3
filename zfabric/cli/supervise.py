"""Processes that belong to this one: started in order, started again when they end, and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Protocol

from zfabric.cli.children import Child, Command
from zfabric.errors import ConfigurationError
from zfabric.fleet.limits import RESTART_JITTER, RESTART_MAX_MS, RESTART_MIN_MS


class Keeping(Protocol):
    """Who keeps commands going by their names; the methods are those of `Supervisor`."""

    #: How long all of them together may drain.
    limit_s: float

    @property
    def commands(self) -> dict[str, Command]: ...
    def keep(self, command: Command) -> asyncio.Event: ...
    async def remove(self, name: str) -> None: ...
    async def stop(self) -> None: ...
    def hang_up(self, names: Iterable[str]) -> None: ...


class Supervisor:
    """Children by name, in the order in which they need one another.

    Args:
        log: Called with an event and its fields.
        limit_s: How long all of them together may drain.
    """

    def __init__(self, log: Callable[..., Any], limit_s: float) -> None:
        self._log = log
        self.limit_s = limit_s
        self._stopping = False
        self._children: dict[str, Child] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Only when restarts happen depends on it.
        self._rng = random.Random()

    @property
    def commands(self) -> dict[str, Command]:
        """What is kept going, by name."""
        return {name: child.command for name, child in self._children.items()}

    def child(self, name: str) -> Child | None:
        """One of them, to look at."""
        return self._children.get(name)

    async def add(self, command: Command) -> dict[str, str]:
        """Start a child, and keep it going. Returns what it tells when it is ready.

        Raises:
            ConfigurationError: It ended instead, or all are being stopped.
        """
        child = Child(command)
        if not self._stopping:
            self._children[child.name] = child
            told = await child.start()
        if self._stopping:
            # It may have become ready while it was told to end.
            raise ConfigurationError(f"the {child.name} is not started: all are being stopped")
        self._log("child_ready", name=child.name, pid=child.pid)
        self._tasks[child.name] = asyncio.create_task(self._keep(child), name=f"keep-{child.name}")
        return told

    def keep(self, command: Command) -> asyncio.Event:
        """Have a child started soon, and kept going. One that ends before it is ready is started again as any other.

        Returns:
            What is set when it is ready, or has ended without.
        """
        tried = asyncio.Event()
        if not self._stopping:
            child = self._children[command.name] = Child(command)
            self._tasks[child.name] = asyncio.create_task(self._keep(child, tried), name=f"keep-{command.name}")
        else:
            tried.set()
        return tried

    async def remove(self, name: str) -> None:
        """End a child, and start it no more. One that is not there, or ends already, is no mistake."""
        child = self._children.get(name)
        if child is None:
            return
        await self._release([name])
        await child.stop(self.limit_s)
        # Another may have been started under its name by now.
        if self._children.get(name) is child:
            del self._children[name]
            self._log("child_stopped", name=name)

    async def stop(self) -> None:
        """End all, stage after stage; nothing is started from now on. What still runs at the end of the time has to go."""
        self._stopping = True
        await self._release(list(self._tasks))
        loop = asyncio.get_running_loop()
        until = loop.time() + self.limit_s
        children = sorted(self._children.values(), key=lambda child: child.command.stage)
        for _, stage in groupby(children, key=lambda child: child.command.stage):
            left_s = max(0.0, until - loop.time())
            await asyncio.gather(*(child.stop(left_s) for child in stage))

    def hang_up(self, names: Iterable[str] | None = None) -> None:
        """Have all, or those of these names, read their files anew. One that still starts reads them anyway."""
        for name in self._children if names is None else names:
            if self._children[name].is_ready:
                self._children[name].send_signal(signal.SIGHUP)

    async def _release(self, names: list[str]) -> None:
        """Keep them no longer."""
        tasks = [self._tasks.pop(name) for name in names if name in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, child: Child, tried: asyncio.Event | None = None) -> None:
        """Keep a child going that is ready, or start it first and say that this was `tried`."""
        loop = asyncio.get_running_loop()
        pause_ms = RESTART_MIN_MS / 2
        starts = tried is not None
        while True:
            began = loop.time()
            if starts:
                try:
                    with contextlib.suppress(ConfigurationError):
                        await child.start()
                        self._log("child_ready", name=child.name, pid=child.pid)
                finally:
                    if tried is not None:
                        tried.set()
            code = await child.ended()
            starts = True
            # One that ran for a while has earned a quick start.
            lasted = loop.time() - began >= RESTART_MAX_MS / 1_000
            pause_ms = RESTART_MIN_MS if lasted else min(2 * pause_ms, RESTART_MAX_MS)
            # Several that broke of one cause do not all come back at one moment.
            again_ms = round(pause_ms * self._rng.uniform(1 - RESTART_JITTER, 1))
            self._log("child_ended", name=child.name, code=code, again_in_ms=again_ms)
            await asyncio.sleep(again_ms / 1_000)
