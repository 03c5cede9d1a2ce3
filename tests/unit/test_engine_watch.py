"""Engines that hang: each of a worker's engines for itself, by its own counter."""

from __future__ import annotations

import pytest

from tests.broker import CANCELLED, Bench, FakeWorker, carried_of, model_of
from zfabric.errors import EngineStalledError
from zfabric.wire import codec
from zfabric.wire.messages import ModelInfo
from zfabric.wire.status import WorkerStatus

STALLED = EngineStalledError.code
BOTH = [model_of("a", engine=0), model_of("b", engine=1)]


def two_engines(bench: Bench, slots: int = 4, models: list[ModelInfo] | None = None) -> FakeWorker:
    return bench.worker(models=models or BOTH, slots=slots)


def state_of(bench: Bench) -> str:
    client = bench.client(99)
    (answer,) = client.ask("workers")
    client.leave()
    (row,) = codec.unpack_result(bytes(answer.result), list[WorkerStatus])
    return row.state


def test_a_hung_engine_does_not_hide_behind_another() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = two_engines(bench), bench.client()
    worker.slow = True
    client.submit(1, model="a")
    client.submit(2, model="b")
    for step in range(12):
        worker.load(step, 7)
        bench.sleep(100)
    assert client.codes() == {(2, 0): STALLED}
    assert worker.aborted() == [(2, 0)]
    assert state_of(bench) == "stalled"
    client.submit(3, model="b")
    client.submit(4, model="a")
    assert [line.request for line in worker.dispatched()] == [1, 2, 4]
    worker.load(13, 8)
    assert state_of(bench) == "ready"
    assert [line.request for line in worker.dispatched()] == [3]
    worker.end(11, (2, 0), code=CANCELLED)
    worker.end(11, (1, 0), (3, 0), (4, 0))
    codes = client.codes()
    assert {key: codes[key] for key in ((1, 0), (3, 0), (4, 0))} == {(1, 0): 0, (3, 0): 0, (4, 0): 0}
    bench.check_rest()


def test_an_engine_that_has_stopped_all_it_was_told_to_stop_hangs_no_more() -> None:
    """It may never move again for want of work."""
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(slots=1), bench.client()
    worker.slow = True
    client.submit(1)
    worker.load(5, slots=1)
    bench.sleep(1_100)
    worker.load(5, slots=1)
    client.submit(2)
    worker.load(5, slots=1)
    assert [line.request for line in worker.dispatched()] == [1]
    worker.end(11, (1, 0), code=CANCELLED)
    worker.load(5, slots=1)
    assert [line.request for line in worker.dispatched()] == [2]


def test_what_a_hung_engine_holds_is_no_load_for_the_others() -> None:
    """Its slots are the worker's, but it is the engine that does not give them back."""
    bench = Bench(stall_ms=1_000)
    worker, client = two_engines(bench, slots=2), bench.client()
    worker.slow = True
    client.submit(1, model="b")
    client.submit(2, model="b")
    client.submit(3, model="a")
    worker.load(0, 0, slots=2)
    bench.sleep(1_100)
    worker.load(0, 0, slots=2)
    assert client.codes() == {(1, 0): STALLED, (2, 0): STALLED}
    assert [line.request for line in worker.dispatched()] == [1, 2, 3]


@pytest.mark.parametrize("engines", [[None], [None, 4]])
def test_an_engine_that_tells_no_progress_is_never_taken_for_hung(engines: list[int | None]) -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(), bench.client()
    client.submit(1)
    for _ in range(50):
        worker.load(*engines)
        bench.sleep(1_000)
    assert client.codes() == {}


def test_an_engine_without_work_may_stand_still() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = two_engines(bench), bench.client()
    for _ in range(5):
        worker.load(3, 3)
        bench.sleep(1_000)
    client.submit(1, model="a")
    # It has had no time yet.
    bench.sleep(900)
    worker.load(3, 3)
    assert client.codes() == {}
    bench.sleep(200)
    worker.load(3, 3)
    assert client.codes() == {(1, 0): STALLED}


def test_calls_and_finished_answers_are_no_work_of_an_engine() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(), bench.client(secret=b"s")
    client.submit(1, operation="operate", model="", worker="w")
    client.submit(2)
    client.cut()
    worker.end(11, (2, 0))
    for _ in range(4):
        worker.load(3)
        bench.sleep(300)
    again = client.back((1, 0, 0), (2, 0, 0))
    for _ in range(4):
        worker.load(3)
        bench.sleep(1_000)
    assert again.codes() == {}
    assert len(worker.grants()) == 2


def test_a_worker_that_tells_of_no_engines_has_one() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(models=[model_of("a"), model_of("b")]), bench.client()
    client.submit(1, model="a")
    client.submit(2, model="b")
    for _ in range(3):
        worker.load(progress=5)
        bench.sleep(600)
    assert client.codes() == {(1, 0): STALLED, (2, 0): STALLED}


@pytest.mark.parametrize("draining", [False, True])
def test_an_engine_that_hangs_while_its_worker_drains(draining: bool) -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(), bench.client()
    client.submit(1)
    for _ in range(3):
        worker.load(5, draining=draining)
        bench.sleep(600)
    assert client.codes() == {(1, 0): STALLED}
    assert state_of(bench) == ("draining" if draining else "stalled")


def test_a_request_stays_with_the_engine_that_runs_it() -> None:
    """The worker announces its models anew, and the model is another engine's now."""
    bench = Bench(stall_ms=1_000)
    worker, client = two_engines(bench), bench.client()
    client.submit(1, model="a")
    worker.hello("w", models=[model_of("a", engine=1), model_of("b", engine=0)])
    for step in range(3):
        worker.load(5, step)
        bench.sleep(600)
    assert client.codes() == {(1, 0): STALLED}
    bench.check_rest()


def test_a_model_that_its_worker_serves_no_more_still_has_its_engine() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = two_engines(bench), bench.client()
    client.submit(1, model="b")
    worker.hello("w", models=BOTH[:1])
    for step in range(3):
        worker.load(step, 5)
        bench.sleep(600)
    assert client.codes() == {(1, 0): STALLED}
    bench.check_rest()


def test_requests_that_a_worker_brought_back_are_work_too() -> None:
    bench = Bench(stall_ms=1_000)
    worker, client = bench.worker(), bench.client()
    client.submit(1)
    worker.cut()
    client.terminals()
    client.claim((1, 0, 0))
    again = worker.back(carried_of(11, 1))
    for _ in range(3):
        again.load(5)
        bench.sleep(600)
    assert client.codes() == {(1, 0): STALLED}
    assert again.aborted() == [(1, 0)]
    bench.check_rest()
