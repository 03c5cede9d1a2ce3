"""The flight recorder's inner half: what happened to peers and requests, with the time at which it did.

A core records into this while it has one, and its driver takes what is there and keeps it (`zfabric.recording`). Nothing is
recorded for a token, and nothing that is anybody's secret: no prompt, text, key or session's token, but names, numbers and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from zfabric.limits import RECORDED_PENDING_MAX


class Recorded(NamedTuple):
    """One event.

    Attributes:
        at_ns: When, on the clock of the core's driver.
        event: What happened, a key of `MEANINGS`, or an event of the journal.
        fields: The values that belong to it.
    """

    at_ns: int
    event: str
    fields: dict[str, object]


class Recorder:
    """Collects events until the driver takes them.

    Args:
        now_ns: The time of what happens now.

    Attributes:
        pending: What was not taken, oldest first.
    """

    __slots__ = ("_left_out", "_now_ns", "pending")

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self.pending: list[Recorded] = []
        self._left_out = 0

    def record(self, event: str, **fields: object) -> None:
        """Something happened."""
        if len(self.pending) < RECORDED_PENDING_MAX:
            self.pending.append(Recorded(self._now_ns(), event, fields))
        else:
            self._left_out += 1

    def take(self) -> list[Recorded]:
        """All events since the last call, and how many of them there was no room for."""
        taken, self.pending = self.pending, []
        if self._left_out:
            taken.append(Recorded(self._now_ns(), "left_out", {"events": self._left_out}))
            self._left_out = 0
        return taken


#: What a recording holds beside the events of a controller's journal. `request` is always the client's instance, the request's
#: number and its attempt.
MEANINGS: Final[dict[str, str]] = {
    "config": "The controller's settings, at the start of each part of the recording, and after a change.",
    "worker_there": "A worker that was registered before this part of the recording began.",
    "submitted": "An attempt of a request was accepted: whose, for what, how large, how urgent. One above 0 follows a loss.",
    "rejected": "An attempt of a request was turned away, for this reason.",
    "dispatched": "A worker was given an attempt: chosen at once, from a queue, moved from another model's, or asked for.",
    "ended": "An attempt has its terminal: completed, failed, cancelled or expired, with the code of its error.",
    "given_up": "An attempt is stopped since nobody waits for it any more: its client is gone, or sent another attempt.",
    "load": "What a worker's beat told, where it differs from the beat before.",
    "begun": "A worker has taken an attempt.",
    "first_token": "The first unit of an answer is there, at its worker.",
    "answered": "An answer is whole, or has failed: its units, and the code of its error.",
    "left_out": "So many events came in one turn that some were not recorded.",
}
