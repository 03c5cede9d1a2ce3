"""What a controller notes of traced attempts: one span for each, whatever becomes of it, and none of any other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.broker import Bench, carried_of
from tests.peers import FakeFabric, model
from zfabric.core.controller.spans import AttemptSpan
from zfabric.core.spans import Spans
from zfabric.errors import (
    BackendError,
    DeadlineExceededError,
    QueueFullError,
    RequestCancelledError,
    WorkerLostError,
)
from zfabric.limits import CLAIM_MS, SPAN_EVENTS_MAX
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import Submit
from zfabric.wire.traces import TraceContext, parse

PARENT = TraceContext(5, 6, 1, "vendor=a")
TRACED: dict[str, Any] = {"traceparent": PARENT.traceparent, "tracestate": PARENT.state}
SECRET = b"s" * 16


class Traced:
    """A fabric with one client, one worker of one slot, and the spans of it."""

    def __init__(self, **settings: object) -> None:
        self.fabric = FakeFabric(**settings)
        self.spans = self.fabric.broker.trace()
        self.fabric.client("alice")
        self.fabric.worker("w", model())

    def submit(self, request: int, **values: Any) -> None:
        self.fabric.submit("alice", request, **{**TRACED, **values})

    def told(self) -> list[tuple[int, int, str | None, int]]:
        """(request, attempt, outcome, code) of each span that has ended."""
        return [(span.asked.request, span.asked.attempt, span.outcome, span.code) for span in self.spans.take()]


def test_an_attempt_is_dispatched_below_its_span_and_told_once() -> None:
    at = Traced()
    at.submit(1)
    (dispatch,) = at.fabric.dispatches["w"]
    assert at.told() == []
    at.fabric.pass_ms(20, "w")
    at.fabric.end("w", "alice", 1)
    (span,) = at.spans.pending
    assert parse(dispatch.traceparent, dispatch.tracestate) == span.context
    assert span.parent == PARENT
    assert (span.context.trace_id, span.context.state) == (PARENT.trace_id, PARENT.state)
    assert len({PARENT.span_id, span.context.span_id, span.queue.span_id}) == 3
    assert (span.worker, span.model, span.decision) == ("w", "m", "chosen")
    assert span.ended_ns - span.began_ns == 20_000_000
    assert at.told() == [(1, 0, "completed", 0)]
    at.fabric.leave("alice")
    assert at.told() == []


@pytest.mark.parametrize("given", ["", "nonsense", PARENT._replace(flags=0).traceparent])
def test_nothing_is_noted_of_what_is_not_traced_or_not_sampled(given: str) -> None:
    at = Traced()
    at.submit(1, traceparent=given)
    assert at.fabric.dispatches["w"][0].traceparent == given
    at.fabric.end("w", "alice", 1)
    at.submit(2, traceparent=given, model="nobody-serves-this")
    assert at.told() == []


def test_each_way_to_end_is_told_once() -> None:
    at = Traced(queue_depth_max=2)
    at.submit(1)
    at.submit(2)
    at.submit(3, deadline_ms=50)
    at.submit(4)
    assert at.told() == [(4, 0, "rejected", QueueFullError.code)]
    at.fabric.cancel("alice", 2)
    assert at.told() == [(2, 0, "cancelled", RequestCancelledError.code)]
    at.fabric.pass_ms(60, "w")
    assert at.told() == [(3, 0, "expired", DeadlineExceededError.code)]
    at.fabric.end("w", "alice", 1, code=BackendError.code)
    assert at.told() == [(1, 0, "failed", BackendError.code)]
    at.submit(5, deadline_ms=50)
    at.fabric.pass_ms(60, "w")
    # It is told when its worker has stopped.
    assert at.told() == []
    at.fabric.end("w", "alice", 5, code=RequestCancelledError.code)
    assert at.told() == [(5, 0, "expired", DeadlineExceededError.code)]
    at.submit(6)
    at.submit(7)
    at.fabric.leave("alice")
    at.fabric.end("w", "alice", 6)
    assert at.told() == [(7, 0, None, 0), (6, 0, None, 0)]


def test_a_failover_is_told_by_both_attempts() -> None:
    at = Traced()
    at.submit(1)
    at.fabric.lose("w")
    (lost,) = at.spans.take()
    assert (lost.outcome, lost.code, [event.name for event in lost.events]) == (
        "failed",
        WorkerLostError.code,
        ["zfabric.worker_lost"],
    )
    at.fabric.worker("v", model())
    at.submit(1, attempt=1, resume_from=3)
    at.fabric.end("v", "alice", 1, attempt=1)
    (went_on,) = at.spans.take()
    assert [(event.name, event.fields) for event in went_on.events] == [
        ("zfabric.failover", {"attempt": 1}),
        ("zfabric.resumption", {"unit": 3}),
    ]
    assert (went_on.worker, went_on.outcome) == ("v", "completed")


def test_what_a_worker_brings_back_is_another_span_of_its_attempt() -> None:
    bench = Bench()
    spans = bench.broker.trace()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5, **TRACED)
    worker.cut()
    (lost,) = spans.take()
    again = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    client.claim((5, 0, 0))
    again.end(11, (5, 0))
    (back,) = spans.take()
    assert [event.name for event in back.events] == ["zfabric.worker_back"]
    assert back.parent == lost.parent
    assert back.context != lost.context
    assert (back.worker, back.outcome) == (lost.worker, "completed")


def test_a_client_that_comes_back_is_told() -> None:
    bench = Bench()
    spans = bench.broker.trace()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5, **TRACED)
    client.cut()
    bench.sleep(CLAIM_MS - 200)
    again = client.back((5, 0, 3))
    worker.end(11, (5, 0), client=again.number)
    (span,) = spans.take()
    assert [event.name for event in span.events] == ["zfabric.client_back"]
    assert span.outcome == "completed"


def test_events_without_end_are_not_kept() -> None:
    spans: Spans[AttemptSpan] = Spans(random.Random(1))
    span = AttemptSpan(spans, PARENT, Submit(request=1, attempt=0, operation="generate", model="m"), 0)
    for number in range(2 * SPAN_EVENTS_MAX):
        span.note("zfabric.client_back", number)
    assert len(span.events) == SPAN_EVENTS_MAX
