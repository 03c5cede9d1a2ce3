"""What traces are told by a machine that has no clock and no exporter: spans that have ended, collected as sends are.

The driver takes them when what has come is handled, and makes of them what its exporter wants. Nothing is noted of a request
whose client has it not traced.
"""

from __future__ import annotations

import random
from typing import Generic, NamedTuple, TypeVar

from zfabric.errors import Detail
from zfabric.wire.traces import TraceContext, parse

S = TypeVar("S")


class SpanEvent(NamedTuple):
    """Something that befell a request."""

    name: str
    at_ns: int
    fields: dict[str, Detail]


class Spans(Generic[S]):
    """Collects spans until the driver takes them.

    Args:
        rng: Draws their numbers.

    Attributes:
        pending: What has ended and was not taken: no more than was there while it ran.
    """

    __slots__ = ("_rng", "pending")

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.pending: list[S] = []

    def new_below(self, parent: TraceContext) -> TraceContext:
        """The context of a new span below another."""
        return parent.below(self._rng.getrandbits(64) or 1)

    def put(self, span: S) -> None:
        """A span is complete."""
        self.pending.append(span)

    def take(self) -> list[S]:
        """All that are complete since the last call."""
        taken, self.pending = self.pending, []
        return taken


def recorded(traceparent: str, tracestate: str) -> TraceContext | None:
    """The context of a request that is to be recorded; None for any other."""
    context = parse(traceparent, tracestate) if traceparent else None
    return context if context is not None and context.sampled else None
