"""Spans of the attempts that a worker has, and of the part of each that is its engine's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry import context as current_context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

from zfabric.core.worker.spans import StreamSpan
from zfabric.tracing import attributes
from zfabric.tracing.recorder import Recorder
from zfabric.wire.traces import TraceContext


class WorkerTraces:
    """Makes spans of what `WorkerService` tells as `traces`.

    Args:
        provider: Whose they are.
        worker: The worker's name.

    Example:
        >>> service = WorkerService([backend], WorkerConfig(name="gpu-1"), traces=WorkerTraces(provider, "gpu-1"))
    """

    def __init__(self, provider: TracerProvider, worker: str) -> None:
        self._recorder = Recorder(provider)
        self._worker = worker

    def ended(self, spans: list[StreamSpan]) -> None:
        """Export these."""
        self._recorder.begin()
        for span in spans:
            self._export(span)

    @contextlib.contextmanager
    def current(self, context: TraceContext) -> Iterator[None]:
        """Have spans that a backend's own instrumentation makes belong below this one."""
        span = NonRecordingSpan(attributes.span_context(context, remote=False))
        token = current_context.attach(set_span_in_context(span))
        try:
            yield
        finally:
            current_context.detach(token)

    def _export(self, span: StreamSpan) -> None:
        envelope = span.asked
        name = attributes.operation_name(envelope.operation)
        values = attributes.common(name, envelope.model)
        values["zfabric.request.id"] = f"{envelope.request:x}"
        values["zfabric.attempt"] = envelope.attempt
        values["zfabric.worker"] = self._worker
        if span.outcome.usage is not None:
            values |= attributes.counted(span.outcome.usage)
        if span.finish_reasons:
            values["gen_ai.response.finish_reasons"] = list(span.finish_reasons)
        if span.first_ns:
            values["gen_ai.response.time_to_first_chunk"] = (span.first_ns - span.began_ns) / 1e9
        failure = (span.code, span.outcome.message)
        self._recorder.span(
            f"{name} {envelope.model}".rstrip(),
            SpanKind.SERVER,
            span.parent,
            span.context,
            (span.began_ns, span.ended_ns),
            values,
            span.events,
            failure,
        )
        if span.engine_ns:
            self._recorder.span(
                f"engine {envelope.model}".rstrip(),
                SpanKind.INTERNAL,
                span.context,
                span.engine,
                (span.engine_ns, span.ended_ns),
                values,
                failure=failure,
                remote=False,
            )
