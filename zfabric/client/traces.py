"""Which trace a program's requests belong to, where it knows that from somebody else's headers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, Protocol

from zfabric.core.client.pending import Pending, Sink
from zfabric.core.client.session import ClientSession
from zfabric.core.client.traces import NamedTrace, PassedOn
from zfabric.errors import ConfigurationError, FabricError
from zfabric.wire.fields import Operation
from zfabric.wire.payloads import AnyRequest
from zfabric.wire.traces import TraceContext, parse_headers

_above: Final[ContextVar[TraceContext | None]] = ContextVar("zfabric_trace_above", default=None)


@contextlib.contextmanager
def below(headers: Mapping[str, str]) -> Iterator[None]:
    """Have the requests of a block belong below the span that W3C trace context names.

    Args:
        headers: `traceparent` and, if there is one, `tracestate`, in lower case; what is malformed is ignored. A span that
            OpenTelemetry has as its current one goes before them, in a client that makes spans.

    Example:
        >>> with below({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}):
        ...     stream = client.stream("smollm2", "Once upon a time")
    """
    token = _above.set(parse_headers(headers))
    try:
        yield
    finally:
        _above.reset(token)


def above() -> TraceContext | None:
    """The span that `below` named."""
    return _above.get()


class Tracer(Protocol):
    """Makes a span of each request."""

    def begin(self, operation: str, model: str, request: AnyRequest, above: TraceContext | None) -> NamedTrace:
        """The span of a request that is about to be submitted."""


def submit_traced(
    session: ClientSession,
    tracer: Tracer | None,
    context: TraceContext | None,
    operation: Operation,
    request: AnyRequest,
    sink: Sink,
    now_ns: int,
    **options: Any,
) -> Pending:
    """Submit a request that belongs to a trace. Args: context: The span above it, where OpenTelemetry has no current one.

    Raises:
        FabricError: As `ClientSession.submit`; its span has ended with that.
    """
    if tracer is None:
        trace = PassedOn(context) if context is not None else None
        return session.submit(operation, request, sink, now_ns, trace=trace, **options)
    span = tracer.begin(operation, options["model"], request, context)
    try:
        pending = session.submit(operation, request, sink, now_ns, trace=span, **options)
    except FabricError as error:
        span.ended(error, None)
        raise
    span.submitted(f"{pending.number:x}")
    return pending


def tracer_of(tracing: object) -> Tracer | None:
    """Who makes spans for a client. Args: tracing: As of `AsyncClient`. Raises: ConfigurationError: Nobody can."""
    if tracing is False or tracing is None:
        return None
    try:
        from zfabric.tracing.client import ClientTracer
    except ImportError as error:
        raise ConfigurationError(f"tracing needs {error.name}: pip install 'zfabric[tracing]'") from None
    provider: Any = None if tracing is True else tracing
    return ClientTracer(provider)
