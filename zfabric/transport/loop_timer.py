"""One timer of an asyncio loop, moved about by a core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class LoopTimer:
    """Re-arms one timer of the loop to the next time a core asks for.

    Args:
        tick: Called with no argument when the time has come; it is to call `arm` again.
    """

    __slots__ = ("_at_ns", "_handle", "_loop", "_tick")

    def __init__(self, loop: asyncio.AbstractEventLoop, tick: Callable[[], None]) -> None:
        self._loop = loop
        self._tick = tick
        self._handle: asyncio.TimerHandle | None = None
        self._at_ns: int | None = None

    def arm(self, at_ns: int | None, now_ns: int) -> None:
        """Come back at `at_ns`, None for never. A later time than before costs nothing: the timer fires early then,
        and whoever it wakes arms it again."""
        if at_ns == self._at_ns or (at_ns is not None and self._at_ns is not None and self._at_ns < at_ns):
            return
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._at_ns = at_ns
        if at_ns is not None:
            self._handle = self._loop.call_later(max(0, at_ns - now_ns) / 1e9, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._at_ns = None
        self._tick()

    def cancel(self) -> None:
        """Never come back."""
        self.arm(None, 0)
