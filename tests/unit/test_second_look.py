"""A process that was stopped finds its timers due before it has read anything: it reads before it judges."""

from __future__ import annotations

import pytest

from tests.broker import MILLISECOND, Bench, carried_of, claim_of
from zfabric.core.timers import Timers
from zfabric.errors import ConnectionLostError
from zfabric.limits import CLAIM_MS, SECOND_LOOK_MS
from zfabric.wire.load import Load

LOOK_NS = SECOND_LOOK_MS * MILLISECOND


def test_a_judgement_comes_at_its_time_where_nothing_is_late() -> None:
    timers, made = Timers(), list[int]()
    timers.judge_at(1_000 * MILLISECOND, made.append)
    timers.at(1_000 * MILLISECOND, made.append)
    while (due_ns := timers.next_ns()) is not None:
        timers.run(due_ns)
    assert made == [1_000 * MILLISECOND] * 2


@pytest.mark.parametrize("stopped_ns", [0, 949 * MILLISECOND, 960 * MILLISECOND])
def test_a_judgement_that_would_be_late_is_made_after_another_look(stopped_ns: int) -> None:
    """The process stops at some time and goes on four seconds later."""
    timers, made = Timers(), list[int]()
    timers.judge_at(1_000 * MILLISECOND, made.append)
    timers.run(stopped_ns)
    timers.run(5_000 * MILLISECOND)
    assert made == []
    assert timers.next_ns() == 5_000 * MILLISECOND + LOOK_NS
    timers.run(5_000 * MILLISECOND + LOOK_NS)
    assert len(made) == 1


def test_a_driver_that_is_always_late_puts_nothing_off_for_ever() -> None:
    timers, made = Timers(), list[int]()
    timers.judge_at(0, made.append)
    for second in range(10):
        timers.run(second * 1_000 * MILLISECOND)
    assert len(made) == 1


def test_a_judgement_can_be_cancelled_between_its_looks() -> None:
    timers, made = Timers(), list[int]()
    timer = timers.judge_at(1_000 * MILLISECOND, made.append)
    timers.run(960 * MILLISECOND)
    timers.cancel(timer)
    timers.run(2_000 * MILLISECOND)
    assert (made, len(timers)) == ([], 0)


def stopped_for(bench: Bench, milliseconds: int) -> None:
    """The controller is stopped, and its timers come before anything that waits in its socket."""
    bench.now_ns += milliseconds * MILLISECOND
    bench.broker.tick(bench.now_ns)
    bench._deliver()


def test_leases_are_judged_after_reading() -> None:
    bench = Bench()
    workers = [bench.worker(f"w{number}", instance=number, beats=True) for number in range(3)]
    bench.sleep(2_000)
    stopped_for(bench, 4_000)
    assert len(bench.broker.registry.workers) == 3
    for worker in workers[:2]:
        worker.send(Load(slots=4))
    bench.sleep(SECOND_LOOK_MS + 1)
    assert set(bench.broker.registry.workers) == {"w0", "w1"}


def test_a_client_that_came_back_during_the_stop_finds_its_requests() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=b"s")
    client.submit(5)
    client.cut()
    stopped_for(bench, 4_000)
    again = client.back((5, 0, 0))
    assert len(worker.grants()) == 1
    assert again.codes() == {}


def test_a_worker_that_came_back_during_the_stop_brings_its_requests() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    worker.cut()
    client.terminals()
    client.claim((5, 0, 0))
    stopped_for(bench, 4_000)
    again = worker.back(carried_of(11, 5))
    assert len(again.grants()) == 1


def test_a_new_controller_that_is_stopped_still_lets_everybody_come_back() -> None:
    bench = Bench(recovery_ms=1_000)
    stopped_for(bench, 4_000)
    client = bench.client(claims=[claim_of(5, 0, 0), claim_of(6, 0, 0)])
    worker = bench.worker(carried=[carried_of(11, 5)])
    assert len(worker.grants()) == 1
    bench.sleep(SECOND_LOOK_MS + 1)
    assert client.codes() == {(6, 0): ConnectionLostError.code}


def test_time_goes_on_for_who_stays_away() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client()
    client.submit(5)
    client.cut()
    stopped_for(bench, CLAIM_MS * 3)
    assert worker.aborted() == []
    bench.sleep(SECOND_LOOK_MS + 1)
    assert worker.aborted() == [(5, 0)]
    bench.check_rest()
