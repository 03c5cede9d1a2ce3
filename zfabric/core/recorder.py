"""The flight recorder's inner half: what happened to peers and requests, with the time at which it did.

A core records into this while it has one, and its driver takes what is there and keeps it (`zfabric.recording`). Nothing is
recorded for a token, and nothing that is anybody's secret: no prompt, text, key or session's token, but names, numbers and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from zfabric.limits import RECORDED_PENDING_MAX


class Recorded(Struct, array_like=True, gc=False):
    """One event.

    Attributes:
        at_ns: When, on the clock of the core's driver.
        event: What happened, a key of `FIELDS`, or an event of the journal.
        values: Those that belong to it: in the order of `FIELDS`, or by name for an event of the journal. What happens to
            requests is told often, and an array of values costs a third of a map.
    """

    at_ns: int
    event: str
    values: tuple[object, ...] | dict[str, object]


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

    def record(self, event: str, values: tuple[object, ...] | dict[str, object]) -> None:
        """Something happened."""
        if len(self.pending) < RECORDED_PENDING_MAX:
            self.pending.append(Recorded(self._now_ns(), event, values))
        else:
            self._left_out += 1

    def take(self) -> list[Recorded]:
        """All events since the last call, and how many of them there was no room for."""
        taken, self.pending = self.pending, []
        if self._left_out:
            taken.append(Recorded(self._now_ns(), "left_out", (self._left_out,)))
            self._left_out = 0
        return taken


#: Names of the values of each event that is recorded beside those of a controller's journal. `request` is always the client's
#: instance, the request's number and its attempt.
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "started": ("build",),
    "drains": ("in_flight",),
    "stopped": (),
    "config": ("settings",),
    "worker_there": ("worker", "models", "slots", "speed", "in_flight", "draining"),
    "submitted": (
        "request",
        "client",
        "operation",
        "model",
        "worker",
        "priority",
        "deadline_ms",
        "window",
        "resume_from",
        "bytes",
    ),
    "rejected": ("request", "client", "operation", "model", "bytes", "code", "error"),
    "dispatched": ("request", "worker", "model", "decision"),
    "ended": ("request", "outcome", "code", "worker"),
    "given_up": ("request", "why"),
    "load": ("worker", "running", "waiting", "slots", "in_flight", "tokens_per_second", "draining"),
    "begun": ("request", "worker", "operation", "model", "priority", "resume_from", "bytes"),
    "first_token": ("request", "worker"),
    "answered": ("request", "worker", "code", "units", "prompt_tokens"),
    "left_out": ("count",),
}  # fmt: skip
#: What each of them means.
MEANINGS: Final[dict[str, str]] = {
    "started": "A controller begins, and knows nobody. Without a word that the former one stopped it follows a death.",
    "drains": "The controller takes no new requests.",
    "stopped": "The controller ends, and says goodbye to everybody.",
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
    "left_out": "So much came in one turn that so many events, or all of so many bytes of them, were not recorded.",
}
