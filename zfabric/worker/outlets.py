"""Where what a worker notes of its requests leaves the process: spans to whoever traces, events to a recording."""

from __future__ import annotations

from zfabric.core.outlets import Outlets
from zfabric.core.recorder import FIELDS, Recorder
from zfabric.core.worker.sessions import WorkerSessions
from zfabric.recording.config import RecordingConfig
from zfabric.recording.ring import Ring
from zfabric.transport.clock import monotonic_ns, unix_ns
from zfabric.transport.links import Log
from zfabric.version import __version__
from zfabric.worker.traces import Traces


class WorkerOutlets(Outlets):
    """Those of a worker.

    Args:
        sessions: They note from now on what is wanted here.
        traces: Told of spans that have ended.
        record: Where a recording goes.
        log: Told of what fails.

    Raises:
        ConfigurationError: The recording's file cannot be made.
    """

    __slots__ = ("_ring",)

    def __init__(
        self, sessions: WorkerSessions, traces: Traces | None, record: RecordingConfig | None, log: Log
    ) -> None:
        super().__init__(lambda error: log("internal_error", error=f"{type(error).__name__}: {error}", exc_info=error))
        self._ring: Ring | None = None
        if traces is not None:
            self.add(sessions.trace(), traces.ended)
        if record is not None:
            self._ring = Ring(
                record,
                of="worker",
                build=__version__,
                fields=FIELDS,
                clock=monotonic_ns,
                wall_clock=unix_ns,
                on_failure=lambda error: log("recording_failed", error=str(error)),
            )
            sessions.observer.recorder = Recorder(monotonic_ns)
            self.add(sessions.observer.recorder, self._ring.write)

    def close(self) -> None:
        """Pass on the rest, and end."""
        self.pass_on()
        if self._ring is not None:
            self._ring.close()
