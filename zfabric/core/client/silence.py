"""When a controller has been silent for so long that a client goes to another one."""

from __future__ import annotations

from typing import Final

from zfabric import limits
from zfabric.ids import milliseconds

#: What `looks` is set to by an answer that was asked for.
ANSWERED: Final = -1


class Silence:
    """Counts looks at which nothing had come since the one before.

    A controller that has nothing to say but answers is asked less and less often. After one was left, the next is given more
    time, for a while.

    Attributes:
        looks: In a row, how often nothing had come. Whatever comes sets it to 0, an answer to a BEAT to `ANSWERED`.
        period_ms: How long after each other the looks are.
    """

    __slots__ = ("_left_ns", "_patience_ms", "looks", "period_ms")

    def __init__(self) -> None:
        self.looks = 0
        self.period_ms = self._patience_ms = limits.PROBE_MS
        self._left_ns: int | None = None

    @property
    def asks(self) -> bool:
        """Whether it is time to ask: nothing came between the last two looks."""
        return self.looks > 1

    def began(self) -> None:
        """Somebody waits from now on."""
        self.looks, self.period_ms = 0, self._patience_ms

    def lasts(self, now_ns: int) -> bool:
        """Look once more. Returns whether the controller is to be left."""
        if self._left_ns is not None and now_ns - self._left_ns >= milliseconds(limits.PROBE_FORGET_MS):
            self._patience_ms, self._left_ns = limits.PROBE_MS, None
        if self.looks == ANSWERED:
            self.looks, self.period_ms = 0, max(self._patience_ms, min(self.period_ms * 2, limits.PROBE_QUIET_MS))
        elif self.looks == 0:
            self.period_ms = self._patience_ms
        # What comes until the next look takes it back.
        self.looks += 1
        if self.looks <= limits.PROBES_MAX:
            return False
        self._patience_ms = min(self._patience_ms * 2, limits.PROBE_MS_MAX)
        self._left_ns = now_ns
        self.began()
        return True
