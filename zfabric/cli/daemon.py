"""Running a service until a signal: the first drains, the second ends at once. What fails is logged once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Final

import structlog

from zfabric import limits
from zfabric.cli.systemd import notify, watch
from zfabric.errors import FabricError

#: Whether settings are only looked at: `run` starts nothing then.
only_checked: Final[ContextVar[bool]] = ContextVar("only_checked", default=False)


def run(main: Coroutine[Any, Any, int], *, use_uvloop: bool) -> int:
    """Run on a new event loop, uvloop's where it is wanted and installed. Returns the exit code.

    Raises:
        FabricError: As `main` does; every other failure goes to the log, and the exit code is 1.
    """
    if only_checked.get():
        main.close()
        return 0
    # The default of Windows cannot watch a socket of libzmq's.
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    if use_uvloop:
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        try:
            return runner.run(main)
        except FabricError:
            raise
        except Exception:  # noqa: BLE001 — whatever ends a daemon is told where its operator reads
            structlog.get_logger().error("failed", exc_info=True)
            return 1


def on_signals(drain: Callable[[], Awaitable[object]]) -> None:
    """SIGTERM and SIGINT call `drain` once; a second signal ends the process with the usual code."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    async def draining() -> None:
        notify(STOPPING=1)
        try:
            await drain()
        except Exception:  # noqa: BLE001 — a drain that fails must not keep the process alive
            structlog.get_logger().error("drain_failed", exc_info=True)
            leave(1)

    def received(number: int) -> None:
        if tasks:
            leave(128 + number)
        tasks.append(loop.create_task(draining()))

    for number in (signal.SIGTERM, signal.SIGINT):
        _on_signal(loop, number, received)


def on_hangup(reload: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """SIGHUP calls `reload`; one that comes while it runs leads to another run after it."""
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()

    async def reloading() -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            await reload()

    # The loop itself keeps no task alive.
    task = loop.create_task(reloading(), name="reload")
    if hasattr(signal, "SIGHUP"):
        _on_signal(loop, signal.SIGHUP, lambda _: None if task.done() else wanted.set())


def _on_signal(loop: asyncio.AbstractEventLoop, number: signal.Signals, received: Callable[[int], object]) -> None:
    """Have the loop call `received` at a signal, also where loops know nothing of signals."""
    try:
        loop.add_signal_handler(number, received, number)
    except NotImplementedError:
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(received, number))


def leave(code: int) -> None:
    """End the process now, without waiting for threads, which nobody can interrupt."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def ready(**fields: object) -> None:
    """The one line on standard output that says: from now on it works. systemd is told as well, and its watchdog is fed.

    What was loaded until now stays: the collector is told to leave it alone, since one walk over a loaded engine's
    objects holds up all streams for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(limits.COLLECTED_OBJECTS)
    # Whoever started the daemon may read no more; that is no reason to end.
    with contextlib.suppress(BrokenPipeError):
        print("ready", *(f"{name}={value}" for name, value in fields.items()), flush=True)  # noqa: T201
    notify(READY=1, STATUS=" ".join(f"{name}={value}" for name, value in fields.items()))
    watch()
