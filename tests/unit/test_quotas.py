"""Limits of keys at the broker: what is refused, what it costs, and whose turn it is."""

from __future__ import annotations

import pytest

from tests.broker import Bench, FakeClient
from zfabric.core.controller.access import Grant, Limits, Role
from zfabric.core.controller.quotas import Quotas
from zfabric.errors import PermissionDeniedError, RateLimitedError, TooLargeError, WorkerLostError
from zfabric.limits import GROUPS_IDLE_MAX

LIMITED = RateLimitedError.code


def grant(name: str = "k", group: str = "g", limits: Limits | None = None, **fields: object) -> Grant:
    return Grant(name, frozenset({Role.CLIENT}), group=group, limits=limits or Limits(), **fields)  # type: ignore[arg-type]


def holder(bench: Bench, instance: int = 11, **fields: object) -> FakeClient:
    return bench.key_holder(grant(**fields)).hello(instance)  # type: ignore[arg-type]


def test_requests_in_flight_are_those_of_the_whole_group() -> None:
    bench = Bench()
    worker = bench.worker(slots=8)
    limits = Limits(requests_in_flight=2)
    one, other = holder(bench, 11, limits=limits), holder(bench, 12, name="l", limits=limits)
    stranger = holder(bench, 13, group="h", limits=limits)
    one.submit(1)
    other.submit(1)
    other.submit(2)
    (refused,) = other.terminals()
    assert (refused.request, refused.code) == (2, LIMITED)
    assert refused.message == "'g' has 2 requests in flight, limit is 2"
    assert refused.details == {"group": "g", "limit": 2, "retry_after_ms": 1_000}
    stranger.submit(1)
    assert len(worker.dispatched()) == 3
    worker.end(11, (1, 0))
    other.submit(3)
    assert [it.request for it in worker.dispatched()] == [3]


def test_what_was_cancelled_counts_until_its_worker_has_stopped() -> None:
    bench = Bench()
    worker = bench.worker()
    worker.slow = True
    client = holder(bench, limits=Limits(requests_in_flight=1))
    client.submit(1)
    client.cancel(1)
    client.submit(2)
    assert client.codes() == {(2, 0): LIMITED}
    worker.end(11, (1, 0), code=49901)
    client.submit(3)
    assert (3, 0) not in client.codes()


def test_requests_in_a_time() -> None:
    bench = Bench()
    bench.worker(slots=64)
    client = holder(bench, limits=Limits(requests_per_second=4))
    for number in range(6):
        client.submit(number)
    refused = client.terminals()
    assert [(end.request, end.code) for end in refused] == [(4, LIMITED), (5, LIMITED)]
    assert refused[0].details["retry_after_ms"] == 250
    assert refused[0].message == "'g' has had its 4 requests a second, there is more in 250 ms"
    bench.sleep(250)
    client.submit(6)
    client.submit(7)
    # What was refused has cost nothing.
    assert client.codes() == {(7, 0): LIMITED}


def test_tokens_are_counted_when_an_answer_is_over() -> None:
    bench = Bench()
    worker = bench.worker()
    client = holder(bench, limits=Limits(tokens_per_minute=600))
    client.submit(1)
    client.submit(2)
    worker.end(11, (1, 0), units=599)
    client.submit(3)
    assert client.codes() == {(1, 0): 0}
    worker.end(11, (2, 0), units=61)
    client.submit(4)
    (ended, refused) = client.terminals()
    assert (ended.request, ended.code, refused.request, refused.code) == (2, 0, 4, LIMITED)
    # 600 were there and 660 are taken; ten come a second.
    assert refused.details["retry_after_ms"] == 6_100
    bench.sleep(6_100)
    client.submit(5)
    assert client.codes() == {}


def test_only_what_an_attempt_made_itself_is_counted() -> None:
    bench = Bench()
    worker = bench.worker()
    client = holder(bench, limits=Limits(tokens_per_minute=60))
    client.submit(1, resume_from=1_000)
    worker.end(11, (1, 0), units=1_059)
    client.submit(2)
    assert client.codes() == {(1, 0): 0}


def test_the_next_attempt_of_what_was_lost_is_the_same_request() -> None:
    bench = Bench()
    lost = bench.worker("a")
    client = holder(bench, limits=Limits(requests_per_second=1, requests_in_flight=1), prompt_bytes=4)
    client.submit(1, body=b"1234")
    other = bench.worker("b")
    bench.lost(lost.id)
    assert client.codes() == {(1, 0): WorkerLostError.code}
    client.submit(1, 1, body=b"1234 and what was made of it")
    assert [it.attempt for it in other.dispatched()] == [1]
    client.submit(2)
    assert client.codes() == {(2, 0): LIMITED}


def test_an_attempt_that_was_not_lost_goes_round_no_limit() -> None:
    """Whoever replaces a request of its own that runs, or waits, is within its limits or refused."""
    bench = Bench()
    worker = bench.worker(slots=2)
    worker.slow = True
    client = holder(bench, limits=Limits(requests_in_flight=1), prompt_bytes=4)
    client.submit(1)
    client.submit(1, 1)
    assert client.codes() == {(1, 1): LIMITED}
    worker.end(11, (1, 0), code=49901)
    client.submit(2, body=b"12345")
    client.submit(3, 7, body=b"12345")
    assert client.codes() == {(2, 0): TooLargeError.code, (3, 7): TooLargeError.code}


@pytest.mark.parametrize(("priority", "allowed"), [(-1, False), (0, True), (5, True), (6, False)])
def test_priorities_are_those_of_the_key(priority: int, allowed: bool) -> None:
    bench = Bench()
    bench.worker()
    client = holder(bench, priorities=(0, 5))
    client.submit(1, priority=priority)
    assert client.codes() == ({} if allowed else {(1, 0): PermissionDeniedError.code})


def test_keys_of_a_group_share_its_turn() -> None:
    """However many connections a tenant opens, another's first request is next but one."""
    bench = Bench()
    worker = bench.worker(slots=1)
    many = [holder(bench, 20 + number, name=f"k{number}") for number in range(4)]
    single = holder(bench, 50, group="h")
    many[0].submit(1)
    worker.dispatched()
    for client in many:
        client.submit(2)
    single.submit(3)
    order = []
    running = (20, 1)
    for _ in range(5):
        worker.end(running[0], (running[1], 0))
        (following,) = worker.dispatched()
        running = (following.instance, following.request)
        order.append(running[0])
    assert order.index(50) == 1


def test_without_keys_all_is_as_it_was() -> None:
    bench = Bench()
    bench.worker(slots=64)
    client = bench.client()
    for number in range(40):
        client.submit(number, priority=-1_000, body=bytes(100_000))
    assert client.codes() == {}
    assert len(bench.broker.scheduler.quotas) == 0


def test_accounts_do_not_pile_up() -> None:
    quotas = Quotas()
    limits = Limits(requests_per_second=1)
    for number in range(3 * GROUPS_IDLE_MAX):
        assert quotas.of(grant(group=str(number), limits=limits), number) is not None
        assert len(quotas) <= GROUPS_IDLE_MAX
    assert quotas.of(grant(group="none"), 0) is None


def test_other_limits_hold_at_once_and_forget_nothing() -> None:
    bench = Bench()
    bench.worker(slots=64)
    client = holder(bench, limits=Limits(requests_per_second=100))
    for number in range(100):
        client.submit(number)
    bench.grants[client.id] = grant(limits=Limits(requests_per_second=1))
    assert bench.broker.review_keys(bench.now_ns) == []
    client.submit(100)
    (refused,) = client.terminals()
    # The second in which a hundred were had, and the time of another.
    assert refused.details["retry_after_ms"] == 1_000
