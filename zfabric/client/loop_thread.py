"""A thread with an event loop, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from zfabric.client import process
from zfabric.errors import ClosedError, FabricError

T = TypeVar("T")


class LoopThread:
    """Runs calls of other threads on a loop, which starts with the first of them.

    Args:
        open: Called on the loop when it starts. If it raises, the thread ends again, and the next call starts anew.
        close: Awaited on the loop before it ends.
    """

    def __init__(self, open: Callable[[], None], close: Callable[[], Coroutine[Any, Any, None]]) -> None:  # noqa: A002
        self._open = open
        self._close = close
        self._home = process.here
        self._lock = threading.Lock()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loop, unless it runs. Raises: FabricError if it cannot be opened; ClosedError if it was stopped."""
        process.check(self._home)
        with self._lock:
            self._started()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait. An interrupt of the wait (Ctrl-C) cancels it. Raises: as `start`, and what it raises."""
        try:
            process.check(self._home)
            # Within the lock, so that nothing is handed to a loop that is about to end.
            with self._lock:
                future = asyncio.run_coroutine_threadsafe(work, self._started())
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], T]) -> T:
        """Call a function and wait. Raises: as `wait`."""
        return self.wait(_call(function))

    def stop(self) -> None:
        """Close, and end the thread. Safe to call twice, and after a fork."""
        if self._home is not process.here:
            return
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise ClosedError("the client was closed")
        if self._loop is not None:
            return self._loop
        loop = _new_loop()
        thread = threading.Thread(target=_run, args=(loop,), name="zfabric-client", daemon=True)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(_call(self._open), loop).result()
        except BaseException as error:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            if isinstance(error, (FabricError, KeyboardInterrupt)):
                raise
            raise ClosedError(f"the client cannot be opened: {error}") from error
        self._loop, self._thread = loop, thread
        return loop


async def _call(function: Callable[[], T]) -> T:
    return function()


def _new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed: half the time of a turn."""
    try:
        import uvloop
    except ImportError:
        # The default of Windows cannot watch a socket of libzmq's.
        return asyncio.SelectorEventLoop()
    return uvloop.new_event_loop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        # Whoever still waits for a call must hear of the end.
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
