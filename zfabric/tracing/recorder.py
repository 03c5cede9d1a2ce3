"""Makes spans whose numbers and times were noted before, since a core has neither a clock nor an exporter."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

from zfabric.core.spans import SpanEvent
from zfabric.tracing import attributes
from zfabric.tracing.attributes import Values
from zfabric.version import __version__
from zfabric.wire.traces import TraceContext

#: Looks at both clocks, of which the quickest counts: whoever is interrupted between the two reads a wrong distance.
_LOOKS: Final = 3


def _offset_ns() -> int:
    """How far the world's clock is ahead of `time.monotonic_ns`."""
    best: tuple[int, int] | None = None
    for _ in range(_LOOKS):
        before, world, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        found = (after - before, world - (before + after) // 2)
        best = found if best is None else min(best, found)
    assert best is not None
    return best[1]


class _Given(RandomIdGenerator):
    """Gives the next span the number that was noted for it: it is in messages already."""

    span_id = 0

    def generate_span_id(self) -> int:
        return self.span_id


class Recorder:
    """Makes spans with a provider of OpenTelemetry's SDK, which samples, names and exports them.

    Args:
        provider: Whose they are.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._given = _Given()
        self._tracer = provider.get_tracer(attributes.SCOPE, __version__)
        self._tracer.id_generator = self._given  # type: ignore[attr-defined]
        self._offset_ns = 0

    def begin(self) -> None:
        """Read the clocks: times that are noted are those of `time.monotonic_ns`, and spans have those of the world."""
        self._offset_ns = _offset_ns()

    def span(
        self,
        name: str,
        kind: SpanKind,
        parent: TraceContext,
        context: TraceContext,
        times: tuple[int, int],
        values: Values,
        events: Iterable[SpanEvent] = (),
        failure: tuple[int, str] = (0, ""),
        *,
        remote: bool = True,
    ) -> None:
        """One span that has ended.

        Args:
            parent, context: What it is below, and itself.
            times: When it began and ended.
            failure: An error's code, 0 for none, and its message.
            remote: Whether the parent is another process's.
        """
        self._given.span_id = context.span_id
        above = set_span_in_context(NonRecordingSpan(attributes.span_context(parent, remote=remote)))
        began_ns, ended_ns = (at_ns + self._offset_ns for at_ns in times)
        span = self._tracer.start_span(name, above, kind, values, start_time=began_ns)
        for event in events:
            found = {f"zfabric.{field}": value for field, value in event.fields.items() if value is not None}
            span.add_event(event.name, found, event.at_ns + self._offset_ns)
        code, message = failure
        if code:
            span.set_attributes(attributes.error_attributes(code))
            span.set_status(attributes.status_of(code, message))
        span.end(ended_ns)
