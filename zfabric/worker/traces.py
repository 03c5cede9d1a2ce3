"""Which trace a backend's work belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Final, Protocol

from zfabric.core.worker.spans import StreamSpan
from zfabric.wire.traces import TraceContext

_here: Final[ContextVar[TraceContext | None]] = ContextVar("zfabric_trace_here", default=None)


class Traces(Protocol):
    """Who makes spans of what a worker's streams were told."""

    def ended(self, spans: list[StreamSpan]) -> None:
        """Spans that are over; times are those of `time.monotonic_ns`."""

    def current(self, context: TraceContext) -> AbstractContextManager[object]:
        """Have spans that others make within a block belong below this one."""


def trace_headers() -> dict[str, str]:
    """The headers by which whoever a backend asks goes on with its request's trace; empty for a request without one.

    They are those of the request in whose task or call this is called: of `generate`, `begin` and all other operations.

    Example:
        >>> response = await http.post(url, json=body, headers=trace_headers())
    """
    context = _here.get()
    return {} if context is None else context.headers


@contextlib.contextmanager
def within(context: TraceContext, traces: Traces | None) -> Iterator[None]:
    """Have a block, and the tasks that it begins, belong to a trace."""
    token = _here.set(context)
    try:
        with traces.current(context) if traces is not None else contextlib.nullcontext():
            yield
    finally:
        _here.reset(token)
