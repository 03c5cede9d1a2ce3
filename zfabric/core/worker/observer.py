"""What happens to a worker's requests, told once, and kept wherever it is wanted: counted, traced and recorded."""

from __future__ import annotations

from zfabric.core.recorder import Recorder
from zfabric.core.spans import Spans, recorded
from zfabric.core.worker.backlog import Backlog
from zfabric.core.worker.figures import WorkerFigures
from zfabric.core.worker.spans import StreamSpan
from zfabric.wire.answers import Outcome
from zfabric.wire.messages import Dispatch
from zfabric.wire.traces import parse


class WorkerObserver:
    """Where a worker's machine says what it does with requests.

    Args:
        worker: The worker's name.

    Attributes:
        figures: What is counted.
        spans: Where what traces are told is collected; None where nobody makes any.
        recorder: Keeps what happens for a recording; None where there is none.
    """

    __slots__ = ("_worker", "figures", "recorder", "spans")

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self.figures = WorkerFigures()
        self.spans: Spans[StreamSpan] | None = None
        self.recorder: Recorder | None = None

    def came(self, stream: Backlog, envelope: Dispatch, size: int, now_ns: int) -> None:
        """A request has come."""
        stream.began_ns = now_ns
        if envelope.traceparent:
            self._trace(stream, envelope)
        if self.recorder is not None:
            self.recorder.record(
                "begun",
                (
                    (envelope.instance, envelope.request, envelope.attempt),
                    self._worker,
                    envelope.operation,
                    envelope.model,
                    envelope.priority,
                    envelope.resume_from,
                    size,
                ),
            )

    def _trace(self, stream: Backlog, envelope: Dispatch) -> None:
        """Note which trace a request belongs to. What is below that belongs below its engine's span, if there is one."""
        stream.trace = parse(envelope.traceparent, envelope.tracestate)
        parent = recorded(envelope.traceparent, envelope.tracestate) if self.spans is not None else None
        if parent is not None and self.spans is not None:
            stream.span = StreamSpan(self.spans, parent, envelope, stream.began_ns)
            stream.trace = stream.span.engine

    def first_unit(self, stream: Backlog, now_ns: int) -> None:
        """The first unit of a stream is there."""
        stream.first_ns = now_ns
        self.figures.began(stream, now_ns)
        if stream.span is not None:
            stream.span.first_ns = now_ns
        if self.recorder is not None:
            self.recorder.record("first_token", (_name(stream), self._worker))

    def held(self, stream: Backlog, now_ns: int) -> None:
        """A stream has units that its reader has not allowed yet."""
        if not stream.held_ns:
            stream.held_ns = now_ns
            self.figures.credit_waiting += 1

    def released(self, stream: Backlog, now_ns: int) -> None:
        """Credit has come for a stream that was held, or its terminal, which needs none."""
        waited_ns = now_ns - stream.held_ns
        self.figures.credit_waits.observe(waited_ns)
        if stream.span is not None:
            stream.span.note("zfabric.credit_wait", stream.held_ns, waited_ms=waited_ns // 1_000_000)
        stream.held_ns = 0

    def ended(self, stream: Backlog, code: int, outcome: Outcome, now_ns: int) -> None:
        """A stream has ended: `code` is 0, or an error's."""
        if stream.held_ns:
            self.released(stream, now_ns)
        self.figures.ended(stream, code, outcome, now_ns)
        if stream.span is not None:
            stream.span.end(code, outcome, now_ns)
        if self.recorder is not None:
            usage = outcome.usage
            self.recorder.record(
                "answered",
                (
                    _name(stream),
                    self._worker,
                    code,
                    stream.end - stream.resumed,
                    usage.prompt_tokens if usage is not None else None,
                ),
            )


def _name(stream: Backlog) -> tuple[int, int, int]:
    return stream.instance, stream.request, stream.attempt
