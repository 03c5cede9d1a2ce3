"""Simulated time: a heap of things to happen, and the one source of chance."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

MILLISECOND = 1_000_000


class World:
    """Time that moves only when something happens.

    Args:
        seed: Of all chance in a run.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_ns = 1_000 * MILLISECOND
        self.steps = 0
        #: What broke the run where it could not be raised.
        self.broken: BaseException | None = None
        self._order = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []

    def after(self, delay_ms: float, call: Callable[[], None]) -> None:
        """Have `call` made so many milliseconds from now."""
        self.at(self.now_ns + int(delay_ms * MILLISECOND), call)

    def at(self, at_ns: int, call: Callable[[], None]) -> None:
        """Have `call` made at a time, or now if that has passed."""
        self._order += 1
        heapq.heappush(self._heap, (max(at_ns, self.now_ns), self._order, call))

    def run(self, until_ns: int) -> None:
        """Let everything happen that is due before a time."""
        heap = self._heap
        while heap and heap[0][0] <= until_ns:
            self.now_ns, _, call = heapq.heappop(heap)
            self.steps += 1
            call()
            if self.broken is not None:
                raise self.broken
        self.now_ns = max(self.now_ns, until_ns)


class Alarm:
    """Wakes a core when its next timer is due."""

    def __init__(self, world: World, wake: Callable[[], None]) -> None:
        self._world = world
        self._wake = wake
        self._at_ns: int | None = None

    def arm(self, at_ns: int | None) -> None:
        """Be there at `at_ns`; an earlier alarm stands and arms anew."""
        if at_ns is None or (self._at_ns is not None and self._at_ns <= at_ns):
            return
        self._at_ns = at_ns

        def fire() -> None:
            if self._at_ns == at_ns:
                self._at_ns = None
                self._wake()

        self._world.at(at_ns, fire)
