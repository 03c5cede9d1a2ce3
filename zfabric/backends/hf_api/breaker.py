"""Circuit breaker: whether an upstream is worth a request. A pure state machine; the clock is an argument.

closed ──(so many failures in a row)──▶ open ──(its time is over)──▶ probing ──(an answer)──▶ closed
                                          ▲                             │
                                          └───(none: twice as long)─────┘
"""

from __future__ import annotations

from typing import Final, Literal

State = Literal["closed", "open", "probing"]

#: Fewer are bad luck on a network; more keep callers waiting for an upstream that is gone.
FAILURES_MAX: Final = 5
#: A restart of a proxy takes about so long.
OPEN_MIN_S: Final = 1.0
#: However long it was away, an upstream that is back is found within this time.
OPEN_MAX_S: Final = 30.0


class CircuitBreaker:
    """Counts an upstream's failures.

    Args:
        failures_max: Failures in a row that open it.
        open_min_s: How long it stays open the first time; each time without a success in between doubles it.
        open_max_s: The bound of that.
    """

    __slots__ = ("_failures", "_failures_max", "_open_max_s", "_open_min_s", "_open_s", "_state", "_until_s")

    def __init__(
        self, failures_max: int = FAILURES_MAX, open_min_s: float = OPEN_MIN_S, open_max_s: float = OPEN_MAX_S
    ) -> None:
        self._failures_max = failures_max
        self._open_min_s = open_min_s
        self._open_max_s = open_max_s
        self._open_s = open_min_s
        self._until_s = 0.0
        self._failures = 0
        self._state: State = "closed"

    @property
    def state(self) -> State:
        return self._state

    @property
    def dispatchable(self) -> bool:
        """Whether requests may be sent there."""
        return self._state == "closed"

    def wait_s(self, now_s: float) -> float:
        """Time until a probe is due; 0 when it is."""
        return max(0.0, self._until_s - now_s) if self._state == "open" else 0.0

    def begin_probe(self, now_s: float) -> bool:
        """Whether to probe now; only one probe runs at a time."""
        if self._state != "open" or now_s < self._until_s:
            return False
        self._state = "probing"
        return True

    def probed(self) -> None:
        """A probe was answered: requests may come again, but the first one that fails opens it anew."""
        if self._state == "probing":
            self._state = "closed"
            self._failures = self._failures_max - 1

    def succeeded(self) -> None:
        """A request was answered. One that was sent before it opened is no reason to close it."""
        if self._state == "closed":
            self._failures = 0
            self._open_s = self._open_min_s

    def failed(self, now_s: float) -> bool:
        """A request or a probe failed. Returns whether this opened it."""
        if self._state == "open":
            return False
        self._failures += 1
        if self._state == "closed" and self._failures < self._failures_max:
            return False
        self._state = "open"
        self._until_s = now_s + self._open_s
        self._open_s = min(self._open_s * 2, self._open_max_s)
        return True
