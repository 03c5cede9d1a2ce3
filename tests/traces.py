"""Spans of all parties of a test's own process, in memory."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from zfabric.tracing.controller import ControllerTraces
from zfabric.tracing.worker import WorkerTraces


class Recorded:
    """One exporter, and a provider of its own for each party, as in processes of their own.

    Attributes:
        client: Of the program that has a client.
    """

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        self.client = self.provider("client", sampler)

    def provider(self, service: str, sampler: Sampler | None = None) -> TracerProvider:
        """A provider whose spans are told apart by the service's name."""
        made = TracerProvider(sampler, Resource({"service.name": service}), shutdown_on_exit=False)
        made.add_span_processor(SimpleSpanProcessor(self._exporter))
        return made

    def controller(self) -> ControllerTraces:
        """For a controller."""
        return ControllerTraces(self.provider("controller"))

    def worker(self, name: str) -> WorkerTraces:
        """For a worker."""
        return WorkerTraces(self.provider(name), name)

    def spans(self) -> list[ReadableSpan]:
        """All, in the order of their ends."""
        return list(self._exporter.get_finished_spans())

    def of(self, service: str, name: str = "") -> list[ReadableSpan]:
        """Those of a party, whose names begin so."""
        return [span for span in self.spans() if service_of(span) == service and span.name.startswith(name)]

    def one(self, service: str, name: str = "") -> ReadableSpan:
        """The only one of a party."""
        (span,) = self.of(service, name)
        return span


def service_of(span: ReadableSpan) -> str:
    return str(span.resource.attributes["service.name"])


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def said(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]
