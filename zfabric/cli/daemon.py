"""Running a service until a signal: the first drains, the second ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any


def run(main: Coroutine[Any, Any, int], *, use_uvloop: bool) -> int:
    """Run on a new event loop, uvloop's where it is wanted and installed. Returns the exit code."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if use_uvloop:
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def on_signals(drain: Callable[[], Awaitable[object]]) -> None:
    """SIGTERM and SIGINT call `drain` once; a second signal ends the process with the usual code."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[object]] = []

    async def draining() -> object:
        return await drain()

    def received(number: int) -> None:
        if tasks:
            os._exit(128 + number)
        tasks.append(loop.create_task(draining()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)


def ready(**fields: object) -> None:
    """The one line on standard output that says: from now on it works."""
    print("ready", *(f"{name}={value}" for name, value in fields.items()), flush=True)  # noqa: T201
