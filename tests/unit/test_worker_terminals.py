"""What workers say of others' requests, or say twice, or late, changes nothing for anybody."""

from __future__ import annotations

import pytest

from tests.broker import CANCELLED, Bench, FakeClient, FakeWorker, carried_of
from zfabric.errors import BackendError, DeadlineExceededError
from zfabric.wire.flow import Credit, CreditLine


def two_of_each() -> tuple[Bench, FakeWorker, FakeWorker, FakeClient, FakeClient]:
    """Requests 1 and 2 of client 11 run at a and b, request 3 of client 12 at a."""
    bench = Bench()
    a, b = bench.worker("a"), bench.worker("b", instance=2, slots=0)
    first, second = bench.client(11), bench.client(12)
    first.submit(1)
    a.load(slots=0)
    b.load(slots=4)
    first.submit(2)
    b.load(slots=0)
    a.load(slots=4)
    second.submit(3)
    assert [line.request for line in a.dispatched()] == [1, 3]
    assert [line.request for line in b.dispatched()] == [2]
    return bench, a, b, first, second


def test_a_worker_cannot_end_what_runs_elsewhere() -> None:
    bench, a, b, first, _ = two_of_each()
    a.end(11, (1, 0), (2, 0), code=BackendError.code)
    codes = first.codes()
    assert codes.pop((1, 0)) == BackendError.code
    # One outcome is left without an attempt that anybody waits for.
    assert (2, 0) not in codes
    b.end(11, (2, 0))
    assert first.codes() == {(2, 0): 0}
    assert bench.broker.registry.workers["b"].in_flight == 0


def test_a_worker_cannot_speak_to_a_client_that_it_does_not_work_for() -> None:
    _, _, b, _, second = two_of_each()
    b.end(12, (3, 0), texts=[(3, 0, "false")])
    b.say(second.number, 3, 0, "false")
    assert second.texts() == []
    assert second.codes() == {}


def test_a_terminal_said_twice_counts_once() -> None:
    bench, a, _, first, _ = two_of_each()
    a.end(11, (1, 0))
    a.end(11, (1, 0))
    a.end(11, (1, 0), (1, 0))
    assert first.codes() == {(1, 0): 0}
    assert bench.broker.scheduler.figures.total("completed") == 1
    assert bench.broker.registry.workers["a"].in_flight == 1


def test_terminals_of_nobody_and_of_nothing() -> None:
    bench, a, b, first, second = two_of_each()
    a.end(999, (1, 0))
    a.end(11)
    a.end(11, (2**63 - 1, 1_000))
    a.end(11, (1, 0), client=12345)
    assert (first.codes(), second.codes()) == ({(2**63 - 1, 1_000): 0}, {})
    # That one was of a session that is over: its reader may claim it.
    assert bench.broker.registry.workers["a"].in_flight == 1
    first.cut()
    again = first.back((1, 0, 0))
    assert again.terminals() == []
    b.end(11, (2, 0))


def test_a_chunk_of_a_request_that_its_client_gave_up_has_no_way() -> None:
    bench, a, _, first, _ = two_of_each()
    a.slow = True
    number = first.number
    first.cancel(1)
    assert a.aborted() == [(1, 0)]
    first.leave()
    a.say(number, 1, 0, "late")
    assert bench.broker.registry.workers["a"].routes.keys() == {bench.broker.registry.clients[12].number}
    a.end(11, (1, 0), code=CANCELLED)
    assert bench.broker.registry.workers["a"].in_flight == 1


def test_a_deadline_frees_the_way_at_once_and_the_slot_when_the_worker_has_stopped() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client()
    worker.slow = True
    client.submit(1, deadline_ms=100)
    client.submit(2)
    bench.sleep(150)
    assert client.codes() == {(1, 0): DeadlineExceededError.code}
    assert worker.aborted() == [(1, 0)]
    assert [line.request for line in worker.dispatched()] == [1]
    worker.end(11, (1, 0), code=CANCELLED)
    assert [line.request for line in worker.dispatched()] == [2]


@pytest.mark.parametrize("window", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("next_unit", [0, 2**32 - 1])
def test_absurd_credit_is_its_senders_affair(window: int, next_unit: int) -> None:
    bench, a, _, first, second = two_of_each()
    line = CreditLine(request=1, attempt=0, next=next_unit, window=window, again=True)
    first.send(Credit([line, CreditLine(request=3, attempt=0, next=0, window=0)] * 3))
    assert {line[:4] for line in a.grants()} == {(1, 0, next_unit, False)}
    a.end(12, (3, 0))
    assert second.codes() == {(3, 0): 0}
    assert bench.broker.bad_frames == 0


def test_an_attempt_that_two_workers_brought_back_takes_no_second_slot_when_it_is_submitted() -> None:
    bench = Bench(recovery_ms=3_000)
    first = bench.worker("a", carried=[carried_of(11, 1, lock=b"a")], slots=2)
    second = bench.worker("b", instance=2, carried=[carried_of(11, 1, lock=b"b")], slots=0)
    client = bench.client()
    second.end(11, (1, 0))
    client.submit(1)
    known = bench.broker.registry.workers["a"]
    assert len(known.live) == known.in_flight == 1
    first.end(11, (1, 0))
    assert client.codes() == {(1, 0): 0}
    bench.check_rest()


def test_the_same_attempt_submitted_again_takes_no_second_slot() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=2), bench.client()
    worker.slow = True
    client.submit(1)
    client.submit(1)
    bench.sleep(1)
    client.leave()
    again = bench.client(11)
    again.submit(1)
    known = bench.broker.registry.workers["w"]
    assert known.in_flight == len(known.live) == 1
    worker.end(11, (1, 0), code=CANCELLED)
    assert known.in_flight == 0
    worker.end(11, (1, 0))
    bench.check()
    bench.check_rest()
