"""Where what a worker notes of its requests leaves the process: spans to whoever traces, events to a recording."""

from __future__ import annotations

import contextlib

from zfabric.core.recorder import FIELDS, Recorder
from zfabric.core.worker.session import WorkerSession
from zfabric.recording.config import RecordingConfig
from zfabric.recording.ring import Ring
from zfabric.transport.clock import monotonic_ns, unix_ns
from zfabric.transport.links import Log
from zfabric.version import __version__
from zfabric.worker.traces import Traces


class Outlets:
    """Passes on what a session notes. Without traces and recording that is nothing.

    Args:
        session: It notes from now on what is wanted here.
        traces: Told of spans that have ended.
        record: Where a recording goes.
        log: Told if nothing can be recorded any more.

    Raises:
        ConfigurationError: The recording's file cannot be made.
    """

    __slots__ = ("_recorder", "_ring", "_spans", "_traces")

    def __init__(self, session: WorkerSession, traces: Traces | None, record: RecordingConfig | None, log: Log) -> None:
        self._traces = traces
        self._spans = session.trace() if traces is not None else None
        self._recorder: Recorder | None = None
        self._ring: Ring | None = None
        if record is not None:
            self._recorder = session.observer.recorder = Recorder(monotonic_ns)
            self._ring = Ring(
                record,
                of="worker",
                build=__version__,
                fields=FIELDS,
                clock=monotonic_ns,
                wall_clock=unix_ns,
                on_failure=lambda error: log("recording_failed", error=str(error)),
            )

    def pass_on(self) -> None:
        """Pass on what was noted in this turn of the loop. Whoever reads it must not cost anybody an answer."""
        if self._spans is not None and self._spans.pending and self._traces is not None:
            with contextlib.suppress(Exception):
                self._traces.ended(self._spans.take())
        if self._ring is not None and self._recorder is not None and self._recorder.pending:
            self._ring.write(self._recorder.take())

    def close(self) -> None:
        """Pass on the rest, and end."""
        self.pass_on()
        if self._ring is not None:
            self._ring.close()
