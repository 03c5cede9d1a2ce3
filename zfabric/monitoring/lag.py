"""How late an event loop is: what holds it up, as a backend that computes on it, delays every stream of the process."""

from __future__ import annotations

import asyncio

from zfabric.core.histogram import Histogram
from zfabric.limits import LAG_INTERVAL_MS


class LoopLag:
    """Measures how much later than asked for a timer of the running loop is.

    Attributes:
        measured: What it found since its start.
    """

    def __init__(self) -> None:
        self.measured = Histogram()
        self._loop = asyncio.get_running_loop()
        self._due_s = 0.0
        self._arm()

    def _arm(self) -> None:
        self._due_s = self._loop.time() + LAG_INTERVAL_MS / 1_000
        self._handle = self._loop.call_at(self._due_s, self._look)

    def _look(self) -> None:
        self.measured.observe(int((self._loop.time() - self._due_s) * 1e9))
        self._arm()

    def stop(self) -> None:
        """Measure no more."""
        self._handle.cancel()
