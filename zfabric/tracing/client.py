"""Spans of a client's requests, made with the tracer provider of the program that the client is part of."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanKind, TracerProvider

from zfabric.core.client.traces import NamedTrace, PassedOn
from zfabric.errors import ConfigurationError, FabricError
from zfabric.tracing import attributes
from zfabric.version import __version__
from zfabric.wire.answers import Outcome
from zfabric.wire.payloads import AnyRequest
from zfabric.wire.traces import TraceContext


class ClientTracer:
    """Makes a CLIENT span of each request, below the span that is OpenTelemetry's current one.

    Args:
        provider: Whose spans they are; None for the program's own provider.

    Raises:
        ConfigurationError: It is no provider.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        if provider is not None and not isinstance(provider, TracerProvider):
            raise ConfigurationError(f"tracing is a {type(provider).__name__}, it must be True or a TracerProvider")
        self._tracer = trace.get_tracer(attributes.SCOPE, __version__, provider)

    def begin(self, operation: str, model: str, request: AnyRequest, above: TraceContext | None) -> NamedTrace:
        """The span of a request. One that is not recorded costs no more than to pass its context on."""
        parent = None
        if above is not None and not trace.get_current_span().get_span_context().is_valid:
            parent = trace.set_span_in_context(NonRecordingSpan(attributes.span_context(above, remote=True)))
        name = attributes.operation_name(operation, request)
        span = self._tracer.start_span(
            f"{name} {model}".rstrip(),
            parent,
            SpanKind.CLIENT,
            {**attributes.common(name, model), **attributes.asked(request)},
        )
        context = attributes.trace_context(span.get_span_context())
        return ClientSpan(span, context) if span.is_recording() else PassedOn(context)


class ClientSpan:
    """The span of one request."""

    __slots__ = ("_reasons", "_span", "context")

    def __init__(self, span: Span, context: TraceContext) -> None:
        self._span = span
        self.context = context
        self._reasons: dict[int, str] = {}

    def submitted(self, request_id: str) -> None:
        """It is called so in logs."""
        self._span.set_attribute("gen_ai.response.id", request_id)

    def began(self, worker: str) -> None:
        """The first chunk of an attempt is there."""
        self._span.set_attribute("zfabric.worker", worker)
        self._span.add_event("zfabric.first_chunk", {"zfabric.worker": worker})

    def choice_ended(self, index: int, reason: str) -> None:
        """One of its choices has ended."""
        self._reasons[index] = reason

    def failed_over(self, attempt: int, error: FabricError) -> None:
        """An attempt was lost."""
        found = {**attributes.error_attributes(error.code), "zfabric.attempt": attempt}
        self._span.add_event("zfabric.failover", found)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        """It is over."""
        span = self._span
        if outcome is not None and outcome.usage is not None:
            span.set_attributes(attributes.counted(outcome.usage))
        if self._reasons:
            span.set_attribute("gen_ai.response.finish_reasons", [self._reasons[at] for at in sorted(self._reasons)])
        if error is not None:
            span.set_attributes(attributes.error_attributes(error.code))
            span.set_status(attributes.status_of(error.code, error.message))
        span.end()
