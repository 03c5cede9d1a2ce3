"""A bucket against what it promises: over any time no more than the rate, beside what it holds when it is full."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from zfabric.core.controller.quotas import Bucket

SECOND_NS = 1_000_000_000
steps = st.lists(st.tuples(st.integers(0, 3 * SECOND_NS), st.integers(1, 4)), max_size=60)
rates = st.one_of(st.integers(1, 1_000), st.fractions(Fraction(1, 100), 50).map(float))


@given(rates, st.integers(1, 60), steps)
def test_no_time_gets_more_than_the_rate_allows(rate: float, span_s: int, taken: list[tuple[int, int]]) -> None:
    bucket = Bucket(rate, span_s)
    now_ns = 10 * SECOND_NS
    had: list[int] = []
    for pause_ns, tries in taken:
        now_ns += pause_ns
        for _ in range(tries):
            if not bucket.wait_ns(now_ns):
                bucket.take(1, now_ns)
                had.append(now_ns)
    most = max(Fraction(1), Fraction(rate) * span_s)
    for first in range(len(had)):
        for last in range(first, len(had)):
            time_s = Fraction(had[last] - had[first], SECOND_NS)
            assert last - first + 1 <= most + Fraction(rate) * time_s + 1


@given(rates, st.integers(1, 60), st.lists(st.tuples(st.integers(0, SECOND_NS), st.integers(0, 10_000)), max_size=40))
def test_what_it_says_to_wait_is_what_is_to_be_waited(rate: float, span_s: int, taken: list[tuple[int, int]]) -> None:
    bucket = Bucket(rate, span_s)
    now_ns = 0
    for pause_ns, count in taken:
        now_ns += pause_ns
        bucket.take(count, now_ns)
        wait_ns = bucket.wait_ns(now_ns)
        assert not bucket.wait_ns(now_ns + wait_ns)
        assert not wait_ns or bucket.wait_ns(now_ns + wait_ns - 1)


@given(rates, st.integers(1, 60), st.integers(0, 10**6))
def test_what_was_taken_in_advance_comes_back_at_the_rate(rate: float, span_s: int, count: int) -> None:
    bucket = Bucket(rate, span_s)
    bucket.take(count, 0)
    # Nanoseconds a piece are rounded up.
    assert bucket.full_ns >= count / Fraction(rate) * SECOND_NS
    assert bucket.full_ns <= count * (SECOND_NS / Fraction(rate) + 1)
