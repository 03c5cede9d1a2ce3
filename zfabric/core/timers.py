"""One heap of things to do later. Whoever drives the core asks for the next time and comes back then."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

from zfabric.ids import milliseconds
from zfabric.limits import SECOND_LOOK_MS

#: Cancelled timers are swept out when they are most of the heap; below this size nobody would notice.
_SWEEP_SIZE_MIN: Final = 1_024
_LOOK_NS: Final = milliseconds(SECOND_LOOK_MS)
#: A driver that is late again and again must not put a judgement off for ever.
_LOOKS_MAX: Final = 4


class Timer:
    """A call that is due at `at_ns`, unless cancelled before.

    Attributes:
        looks: How often it still comes back before the call is made: 0 for a plain timer.
    """

    __slots__ = ("at_ns", "call", "due_ns", "looks", "order")

    def __init__(self, at_ns: int, order: int, call: Callable[[int], None]) -> None:
        self.at_ns = self.due_ns = at_ns
        self.order = order
        self.call: Callable[[int], None] | None = call
        self.looks = 0

    def __lt__(self, other: Timer) -> bool:
        return (self.at_ns, self.order) < (other.at_ns, other.order)

    def look_again(self, now_ns: int) -> bool:
        """Whether it has to come back once more, and set when."""
        if not self.looks:
            return False
        first, late = self.looks == _LOOKS_MAX, now_ns - self.at_ns > _LOOK_NS
        if not first and not late:
            return False
        self.looks -= 1
        self.at_ns = max(self.due_ns, now_ns + _LOOK_NS)
        return True


class Timers:
    """Timers in order of time, then of creation: a run is a function of its inputs."""

    __slots__ = ("_cancelled", "_heap", "_order", "now_ns")

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._order = 0
        self._cancelled = 0
        #: The time of the event that is being handled, set by the core that owns the timers.
        self.now_ns = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def at(self, at_ns: int, call: Callable[[int], None]) -> Timer:
        """Have `call(now_ns)` made once `at_ns` is reached."""
        self._order += 1
        timer = Timer(at_ns, self._order, call)
        heapq.heappush(self._heap, timer)
        return timer

    def judge_at(self, at_ns: int, call: Callable[[int], None]) -> Timer:
        """Have `call(now_ns)` made once `at_ns` is reached and what had arrived by then has been read.

        For calls that judge by what was not heard. A process that was stopped wakes to find them due, with the very
        messages that prove them wrong in its socket. So the timer comes twice, SECOND_LOOK_MS apart, and whoever drives
        the core reads in between; if the second time is late as well, there was another stop, and it comes once more.
        """
        timer = self.at(at_ns - _LOOK_NS, call)
        timer.due_ns, timer.looks = at_ns, _LOOKS_MAX
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Forget a timer; None and finished ones are fine."""
        if timer is None or timer.call is None:
            return
        timer.call = None
        self._cancelled += 1
        if self._cancelled > _SWEEP_SIZE_MIN and self._cancelled > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry.call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_ns(self) -> int | None:
        """When to come back, None for never."""
        while self._heap and self._heap[0].call is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0].at_ns if self._heap else None

    def run(self, now_ns: int) -> None:
        """Make every call that is due."""
        while (due_ns := self.next_ns()) is not None and due_ns <= now_ns:
            timer = heapq.heappop(self._heap)
            if timer.look_again(now_ns):
                heapq.heappush(self._heap, timer)
                continue
            call = timer.call
            timer.call = None
            if call is not None:
                call(now_ns)
