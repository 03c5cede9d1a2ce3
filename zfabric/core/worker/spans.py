"""What a trace is told of one attempt at its worker: the whole of it, and the part that its engine had."""

from __future__ import annotations

from zfabric.core.spans import SpanEvent, Spans
from zfabric.errors import Detail
from zfabric.limits import SPAN_EVENTS_MAX
from zfabric.wire.answers import Outcome
from zfabric.wire.messages import Dispatch
from zfabric.wire.traces import TraceContext


class StreamSpan:
    """One attempt, from its DISPATCH until its engine has ended with it.

    Attributes:
        parent: The controller's span, or the client's.
        context: This span.
        engine: The span of its engine, below this one: what a backend passes on.
        asked: The envelope that it came in.
        began_ns, engine_ns, first_ns, ended_ns: When it came, when its engine got it, when the first unit was there, and when
            it ended; 0 for never.
        code: 0, or the code of the error that it ended with.
        outcome: What its client is told of its end.
        finish_reasons: Of its choices, in the order of their ends.
        events: What else befell it, oldest first.
    """

    __slots__ = (
        "_spans", "asked", "began_ns", "code", "context", "ended_ns", "engine", "engine_ns", "events", "finish_reasons",
        "first_ns", "outcome", "parent",
    )  # fmt: skip

    def __init__(self, spans: Spans[StreamSpan], parent: TraceContext, asked: Dispatch, now_ns: int) -> None:
        self._spans = spans
        self.parent = parent
        self.context = spans.new_below(parent)
        self.engine = spans.new_below(parent)
        self.asked = asked
        self.began_ns = now_ns
        self.engine_ns = self.first_ns = self.ended_ns = 0
        self.code = 0
        self.outcome = Outcome()
        self.finish_reasons: list[str] = []
        self.events: list[SpanEvent] = []

    def note(self, name: str, now_ns: int, **fields: Detail) -> None:
        """Something befell it."""
        if len(self.events) < SPAN_EVENTS_MAX:
            self.events.append(SpanEvent(name, now_ns, fields))

    def end(self, code: int, outcome: Outcome, now_ns: int) -> None:
        """It is over."""
        if not self.ended_ns:
            self.code, self.outcome, self.ended_ns = code, outcome, now_ns
            self._spans.put(self)
