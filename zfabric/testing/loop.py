"""An asyncio loop whose time is the world's: one per simulated process, which can be stopped in its tracks and killed.

It has what tasks, timers and futures need. The rest of `asyncio.AbstractEventLoop` (sockets, signals, subprocesses) raises
NotImplementedError: a simulated process has none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from zfabric.testing.world import World


class SimLoop(asyncio.AbstractEventLoop):
    """Runs callbacks, timers and tasks of one process, and nothing else. Whatever raises in it breaks the run.

    Args:
        world: Time.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        #: In order of their beginning, so that a run is a function of its seed.
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self._ready: deque[asyncio.Handle] = deque()
        self._scheduled = False
        self._frozen_until_ns = 0
        self._dying = self._dead = False

    # ── a process ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def frozen(self) -> bool:
        return self.world.now_ns < self._frozen_until_ns

    def freeze(self, until_ns: int) -> None:
        """SIGSTOP: nothing runs before this time. What is due by then runs then."""
        self._frozen_until_ns = max(self._frozen_until_ns, until_ns)

    def kill(self) -> None:
        """End the process. Its tasks are unwound, for Python's sake; nothing that they say leaves any more."""
        self._dying = True
        # What was not begun is begun, so that nothing is left that was never awaited.
        self._turn()
        while self.tasks:
            for task in list(self.tasks):
                task.cancel()
            while self._ready:
                self._turn()
        self._dead = True
        self._ready.clear()

    # ── what tasks and timers need ──────────────────────────────────────────────────────────────────────────────────

    def time(self) -> float:
        return self.world.now_ns / 1e9

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        self._wake()
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)

        def due() -> None:
            if not handle.cancelled():
                self._ready.append(handle)
                self._wake()

        self.world.at(round(when * 1e9), due)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self.tasks[task] = None
        task.add_done_callback(lambda done: self.tasks.pop(done, None))
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Threads are no part of a simulation: the work is done a moment later, between two turns."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:  # noqa: BLE001 — whoever awaits gets it
                future.set_exception(error)

        self.call_later(0.0005, work)
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._dead

    def is_closed(self) -> bool:
        return self._dead

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are passed over when their time comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._dying:
            error = context.get("exception")
            self.world.broken = error or RuntimeError(context["message"])

    # ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.world.at(self._frozen_until_ns, self._run)

    def _run(self) -> None:
        self._scheduled = False
        if self._dying:
            return
        if not self.frozen:
            self._turn()
        if self._ready:
            self._wake()

    def _turn(self) -> None:
        """Run what is ready now; what it makes ready runs in the next turn."""
        asyncio._set_running_loop(self)
        try:
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)
