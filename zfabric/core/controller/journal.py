"""What happens at a controller that its operator should be able to read: peers that come, go, hang or send what is no use.

Nothing is told per request or per token, but for requests that are turned away since a queue is full, of which the driver's
log passes on a few. Events are collected, as sends are; the driver takes them when what has come is handled.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from zfabric.core.recorder import Recorder
from zfabric.limits import JOURNAL_EVENTS_MAX

Event = Literal[
    "client_registered", "client_lost", "client_left", "worker_registered", "models_announced", "worker_lost", "worker_left",
    "worker_draining", "engine_stalled", "engine_moves", "peer_refused", "bad_message", "queue_full", "recovered",
    "worker_undrained", "model_paused", "model_resumed", "request_cancelled", "client_kicked", "config_changed",
    "session_revoked", "circuit_opened", "circuit_closed", "adapter_asked", "adapter_loaded", "adapter_unloaded",
    "adapter_failed", "adapter_gives_way",
]  # fmt: skip


class Entry(NamedTuple):
    """One event, and the values that belong to it."""

    event: Event
    fields: dict[str, object]


class Journal:
    """Collects events until the driver takes them.

    Args:
        recorder: Keeps these events, and those of requests, for a recording; None where there is none.

    Attributes:
        pending: What was not taken, oldest first.
        dropped: Events that found no room since the last call of `take`.
    """

    __slots__ = ("dropped", "pending", "recorder")

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.pending: list[Entry] = []
        self.dropped = 0

    def note(self, event: Event, **fields: object) -> None:
        """Something happened."""
        if self.recorder is not None:
            self.recorder.record(event, fields)
        if len(self.pending) < JOURNAL_EVENTS_MAX:
            self.pending.append(Entry(event, fields))
        else:
            self.dropped += 1

    def take(self) -> list[Entry]:
        """All events since the last call."""
        taken, self.pending = self.pending, []
        self.dropped = 0
        return taken
