"""Spans of the attempts that a controller saw: from the SUBMIT to the end, and the wait for a worker."""

from __future__ import annotations

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind

from zfabric.core.controller.spans import AttemptSpan
from zfabric.tracing import attributes
from zfabric.tracing.recorder import Recorder


class ControllerTraces:
    """Makes spans of what `Controller` tells as `traces`.

    Args:
        provider: Whose they are.

    Example:
        >>> async with Controller(traces=ControllerTraces(provider)) as controller: ...
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._recorder = Recorder(provider)

    def __call__(self, spans: list[AttemptSpan]) -> None:
        """Export these."""
        self._recorder.begin()
        for span in spans:
            self._export(span)

    def _export(self, span: AttemptSpan) -> None:
        envelope = span.asked
        model = span.model or envelope.model
        name = attributes.operation_name(envelope.operation)
        values = attributes.common(name, model)
        values["zfabric.request.id"] = f"{envelope.request:x}"
        values["zfabric.attempt"] = envelope.attempt
        values["zfabric.priority"] = envelope.priority
        values["zfabric.outcome"] = span.outcome or "replaced"
        if span.worker:
            values["zfabric.worker"] = span.worker
        if span.decision is not None:
            values["zfabric.dispatch.reason"] = span.decision
        self._recorder.span(
            f"attempt {model}".rstrip(),
            SpanKind.INTERNAL,
            span.parent,
            span.context,
            (span.began_ns, span.ended_ns),
            values,
            span.events,
            (span.code, ""),
        )
        until_ns = span.dispatched_ns or span.ended_ns
        self._recorder.span(
            f"queue {model}".rstrip(),
            SpanKind.INTERNAL,
            span.context,
            span.queue,
            (span.began_ns, until_ns),
            {"gen_ai.request.model": model, "zfabric.dispatched": bool(span.dispatched_ns)},
            remote=False,
        )
