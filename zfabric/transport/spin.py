"""Busy polling: after work a loop looks for more for some microseconds before it sleeps.

To be woken costs a process some ten microseconds and cold caches, and more on a virtual machine, whose processor is given away
when it sleeps. A host that gives a processor to a party can have it look instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zfabric.transport.clock import monotonic_ns


class Spinner:
    """Keeps an event loop from sleeping until so much time has passed since the last work.

    A callback that calls itself soon makes any asyncio loop poll its files without waiting. There is one at most, and none
    when the time is over.

    Args:
        loop: Whose sleep is put off.
        spin_us: For how long, in microseconds, after each call of `worked`.
        now_ns: The clock.

    Example:
        >>> spinner = Spinner(loop, spin_us=50)
        >>> spinner.worked()
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, spin_us: int, now_ns: Callable[[], int] = monotonic_ns) -> None:
        self._loop = loop
        self._spin_ns = spin_us * 1_000
        self._now_ns = now_ns
        self._until_ns = 0
        self._spins = False
        self._closed = False

    def worked(self) -> None:
        """There was work: look for more for a while from now on."""
        self._until_ns = self._now_ns() + self._spin_ns
        if not self._spins and not self._closed:
            self._spins = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._closed or self._now_ns() >= self._until_ns:
            self._spins = False
        else:
            self._loop.call_soon(self._turn)

    def close(self) -> None:
        """Let the loop sleep. Safe to call twice."""
        self._closed = True
