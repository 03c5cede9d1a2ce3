"""W3C trace context: what is taken for one, and what is as if it were not there."""

from __future__ import annotations

import random

import pytest
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from zfabric.wire.traces import TraceContext, parse

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_a_context_says_itself_again() -> None:
    context = parse(PARENT, "vendor=a, other=b")
    assert context == TraceContext(int(TRACE, 16), int(SPAN, 16), 1, "vendor=a, other=b")
    assert context is not None
    assert context.sampled
    assert context.headers == {"traceparent": PARENT, "tracestate": "vendor=a, other=b"}
    assert context.below(1).traceparent == f"00-{TRACE}-{1:016x}-01"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        PARENT[:-1],
        PARENT + "-",
        PARENT + "-more",
        PARENT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f" {PARENT}",
        f"01-{PARENT[3:]}-" + "x" * 200,
    ],
)
def test_what_is_malformed_is_none(text: str) -> None:
    assert parse(text) is None


def test_a_later_version_is_taken_as_far_as_it_is_known() -> None:
    context = parse(f"cc-{TRACE}-{SPAN}-09-what-the-future-brings")
    assert context is not None
    assert context.traceparent == f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "state",
    [
        "no member",
        "a=1,a=2",
        "UPPER=1",
        "a=b=c",
        "a" * 257 + "=1",
        "k=" + "v" * 512,
        ",".join(f"k{n}=1" for n in range(33)),
    ],
)
def test_a_malformed_state_does_not_cost_the_parent(state: str) -> None:
    context = parse(PARENT, state)
    assert context is not None
    assert not context.state


def test_opentelemetry_reads_the_same() -> None:
    """Our reader and OpenTelemetry's agree on whatever is almost a `traceparent`."""
    rng = random.Random(5)
    known = TraceContextTextMapPropagator()
    for _ in range(2_000):
        text = list(PARENT)
        for _ in range(rng.randrange(3)):
            text[rng.randrange(len(text))] = rng.choice("0123456789abcdef-gA ")
        said = "".join(text)
        span = get_current_span(known.extract({"traceparent": said}, context={})).get_span_context()  # type: ignore[arg-type]
        ours = parse(said.strip())
        assert (ours is not None) == span.is_valid, said
        if ours is not None:
            assert (ours.trace_id, ours.span_id, ours.sampled) == (
                span.trace_id,
                span.span_id,
                span.trace_flags.sampled,
            )
