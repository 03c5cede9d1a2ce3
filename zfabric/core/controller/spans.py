"""What a trace is told of the attempts that a controller saw: when each came, waited, ran and ended, and what befell it."""

from __future__ import annotations

from zfabric.core.controller.figures import Decision, Outcome
from zfabric.core.spans import SpanEvent, Spans, recorded
from zfabric.errors import Detail
from zfabric.limits import SPAN_EVENTS_MAX
from zfabric.wire.messages import Submit
from zfabric.wire.traces import TraceContext


class AttemptSpan:
    """One attempt, from its SUBMIT until nothing of it is left here.

    Attributes:
        parent: The client's span.
        context: This span, which the worker's belongs below.
        queue: The span of its wait, below this one.
        asked: The envelope that it came in.
        began_ns, dispatched_ns, ended_ns: When that was; 0 for not yet, or never.
        worker, model: Who got it, and what it runs; "" for nobody.
        decision: How it came to its worker.
        outcome, code: How it ended, and the error's code; None where it was given up or replaced.
        events: What else befell it, oldest first.
    """

    __slots__ = (
        "_spans", "asked", "began_ns", "code", "context", "decision", "dispatched_ns", "ended_ns", "events", "model", "outcome",
        "parent", "queue", "worker",
    )  # fmt: skip

    def __init__(self, spans: Spans[AttemptSpan], parent: TraceContext, asked: Submit, now_ns: int) -> None:
        self._spans = spans
        self.parent = parent
        self.context = spans.new_below(parent)
        self.queue = spans.new_below(parent)
        self.asked = asked
        self.began_ns = now_ns
        self.dispatched_ns = self.ended_ns = 0
        self.worker = self.model = ""
        self.decision: Decision | None = None
        self.outcome: Outcome | None = None
        self.code = 0
        self.events: list[SpanEvent] = []

    def note(self, name: str, now_ns: int, **fields: Detail) -> None:
        """Something befell it."""
        if len(self.events) < SPAN_EVENTS_MAX:
            self.events.append(SpanEvent(name, now_ns, fields))

    def dispatched(self, worker: str, model: str, decision: Decision, now_ns: int) -> None:
        """A worker gets it."""
        self.dispatched_ns = now_ns
        self.worker, self.model, self.decision = worker, model, decision

    def judged(self, outcome: Outcome, code: int) -> None:
        """How it ended is known; the first word of it counts."""
        if self.outcome is None:
            self.outcome, self.code = outcome, code

    def end(self, now_ns: int) -> None:
        """Nothing of it is left here."""
        if not self.ended_ns:
            self.ended_ns = now_ns
            self._spans.put(self)

    def again(self, now_ns: int) -> AttemptSpan:
        """Another span of the same attempt, whose worker came back with it."""
        span = AttemptSpan(self._spans, self.parent, self.asked, now_ns)
        span.dispatched_ns, span.worker, span.model = now_ns, self.worker, self.model
        span.note("zfabric.worker_back", now_ns, worker=self.worker)
        return span


def begin(spans: Spans[AttemptSpan], asked: Submit, now_ns: int) -> AttemptSpan | None:
    """The span of an attempt; None where its client wants none recorded."""
    parent = recorded(asked.traceparent, asked.tracestate)
    if parent is None:
        return None
    span = AttemptSpan(spans, parent, asked, now_ns)
    if asked.attempt:
        span.note("zfabric.failover", now_ns, attempt=asked.attempt)
    if asked.resume_from:
        span.note("zfabric.resumption", now_ns, unit=asked.resume_from)
    return span
