"""Lost connections: what both ends still have goes on at the same worker, and nothing else does."""

from __future__ import annotations

import pytest

from tests.broker import CANCELLED, Bench, FakeWorker, carried_of, claim_of, model_of
from zfabric.core.controller.access import Grant, Role
from zfabric.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    NameTakenError,
    NoWorkerError,
    PermissionDeniedError,
    QuotaExceededError,
    WorkerDrainingError,
    WorkerLostError,
)
from zfabric.limits import CLAIM_MS
from zfabric.wire.flow import Abort, Credit, CreditLine
from zfabric.wire.locks import lock_of

SECRET = b"s" * 16
LOST = ConnectionLostError.code


# ── the client's connection ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_running_stream_goes_on_when_its_client_is_back() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    assert worker.dispatched()[0].lock == lock_of(SECRET)
    number = client.number
    client.cut()
    worker.say(number, 5, 0, "nobody hears this")
    bench.sleep(CLAIM_MS - 200)
    assert worker.aborted() == []
    again = client.back((5, 0, 3))
    assert worker.grants() == [(5, 0, 3, True, again.number)]
    assert again.number != number
    worker.say(number, 5, 0, "of the former session")
    worker.say(again.number, 5, 0, "here")
    worker.end(11, (5, 0), client=again.number)
    assert again.texts() == ["here"]
    assert again.codes() == {(5, 0): 0}
    bench.sleep(10_000)
    assert worker.aborted() == []
    bench.check_rest()


def test_an_answer_that_ended_meanwhile_frees_its_slot_and_waits_for_its_reader() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5)
    former = client.number
    client.cut()
    worker.end(11, (5, 0), client=former)
    other = bench.client(12)
    other.submit(6)
    assert [line.request for line in worker.dispatched()] == [5, 6]
    again = client.back((5, 0, 2))
    assert worker.grants() == [(5, 0, 2, True, again.number)]
    assert again.codes() == {}
    worker.end(11, (5, 0), client=again.number, texts=[(5, 0, "the rest")])
    assert again.texts() == ["the rest"]
    assert again.codes() == {(5, 0): 0}
    worker.end(12, (6, 0))
    bench.check_rest()


def test_a_terminal_that_crosses_the_return_of_its_reader_is_kept() -> None:
    """It left under the number of the former session; what it brings along may begin after a gap."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    former = client.number
    client.cut()
    again = client.back((5, 0, 0))
    worker.end(11, (5, 0), client=former, texts=[(5, 0, "late")])
    assert again.terminals() == []
    assert bench.broker.registry.workers["w"].in_flight == 0
    worker.end(11, (5, 0), client=again.number, texts=[(5, 0, "whole")])
    assert again.texts() == ["whole"]
    assert again.codes() == {(5, 0): 0}
    bench.check_rest()


def test_queued_requests_keep_their_place_and_run_for_the_next_session() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    bench.client(12).submit(1)
    client.submit(5)
    client.submit(6)
    client.cut()
    again = client.back((5, 0, 0), (6, 0, 0))
    assert worker.grants() == []
    worker.dispatched()
    worker.end(12, (1, 0))
    sent = worker.dispatched()
    assert [(line.request, line.client, line.window) for line in sent] == [(5, again.number, 200)]
    worker.end(11, (5, 0), client=again.number)
    worker.end(11, (6, 0), client=again.number)
    assert again.codes() == {(5, 0): 0, (6, 0): 0}
    bench.check_rest()


def test_what_is_not_claimed_is_stopped() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=2), bench.client(secret=SECRET)
    for number in (5, 6, 7):
        client.submit(number)
    client.cut()
    again = client.back((5, 0, 0))
    bench.sleep(CLAIM_MS + 100)
    assert worker.aborted() == [(6, 0)]
    assert [line.request for line in worker.dispatched()] == [5, 6]
    worker.end(11, (5, 0), client=again.number)
    assert again.codes()[5, 0] == 0
    bench.check_rest()


def test_a_client_that_stays_away_is_forgotten() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    client.cut()
    bench.sleep(CLAIM_MS - 100)
    assert worker.aborted() == []
    bench.sleep(200)
    assert worker.aborted() == [(5, 0)]
    assert bench.broker.registry.clients == {}
    bench.check_rest()
    late = client.back((5, 0, 0))
    assert late.codes() == {(5, 0): LOST}


def test_a_client_without_requests_leaves_nothing() -> None:
    bench = Bench()
    bench.client().cut()
    assert bench.broker.registry.clients == {}


def test_goodbye_stops_at_once() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    client.leave()
    assert worker.aborted() == [(5, 0)]
    assert bench.broker.registry.clients == {}
    bench.check_rest()


def test_claims_may_come_in_several_messages() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    client.cut()
    again = client.back((5, 0, 1))
    again.claim((6, 0, 4), (6, 0, 4), (5, 0, 9))
    # One that is claimed is no more than a running request: to claim it again is to ask for nothing.
    assert worker.grants() == [(5, 0, 1, True, again.number), (6, 0, 4, True, again.number)]
    worker.end(11, (5, 0), (6, 0), client=again.number)
    assert again.codes() == {(5, 0): 0, (6, 0): 0}


def test_a_late_return_still_has_time_for_all_of_its_claims() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    client.cut()
    bench.sleep(CLAIM_MS - 10)
    again = client.back((5, 0, 0))
    bench.sleep(500)
    again.claim((6, 0, 0))
    assert [line[:2] for line in worker.grants()] == [(5, 0), (6, 0)]
    assert worker.aborted() == []


def test_a_return_that_comes_before_the_news_of_the_loss() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    again = client.back((5, 0, 2))
    assert worker.grants() == [(5, 0, 2, True, again.number)]
    client.cut()
    worker.end(11, (5, 0), client=again.number)
    assert again.codes() == {(5, 0): 0}


def test_a_session_that_ended_under_a_living_connection_goes_on_by_another_hello() -> None:
    """A pipe that stayed full ends the session; the client hears of it when it next says something."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    bench.lost(client.id)
    client.cancel()
    assert "UNKNOWN_SESSION" in client.kinds()
    client.hello(11, secret=SECRET, claims=[claim_of(5, 0, 1)])
    assert worker.grants() == [(5, 0, 1, True, client.number)]
    worker.end(11, (5, 0), client=client.number)
    assert client.codes() == {(5, 0): 0}


@pytest.mark.parametrize("proof", ["secret", "token"])
def test_a_client_comes_back_by_its_secret_or_its_token(proof: str) -> None:
    bench = Bench()
    worker = bench.worker()
    client = bench.client(secret=SECRET if proof == "secret" else b"")
    client.submit(5)
    token = client.welcome.token
    client.cut()
    again = client.back((5, 0, 0), token=b"" if proof == "secret" else token)
    assert again.refusal is None
    assert len(worker.grants()) == 1


@pytest.mark.parametrize("away", [False, True])
def test_nobody_else_comes_back_as_a_client(away: bool) -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    if away:
        client.cut()
    for secret, token in ((b"", b""), (b"guessed", b""), (b"", b"guessed")):
        assert client.back((5, 0, 0), secret=secret, token=token).refusal == NameTakenError.code
    assert worker.grants() == []
    again = client.back((5, 0, 0))
    assert worker.grants() == [(5, 0, 0, True, again.number)]


def test_a_client_that_has_taken_another_number_begins_anew_on_the_same_connection() -> None:
    """Its first HELLO was refused and its second was not, which it had said before it heard of that."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(instance=11, secret=SECRET)
    client.submit(5)
    client.inbox.clear()
    client.hello(12, secret=SECRET)
    assert client.refusal is None
    assert list(bench.broker.registry.clients) == [12]
    assert [(order.instance, order.attempts) for order in worker.take(Abort)] == [(11, [(5, 0)])]
    client.submit(5)
    assert [order.instance for order in worker.dispatched()] == [11, 12]


def test_a_request_is_not_given_to_another_secret_than_it_was_made_with() -> None:
    """The token of the session alone lets a client in; its lock is on the request."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    token = client.welcome.token
    client.cut()
    other = client.back((5, 0, 0), secret=b"another", token=token)
    assert other.codes() == {(5, 0): LOST}
    assert worker.grants() == []
    bench.sleep(CLAIM_MS + 100)
    assert worker.aborted() == [(5, 0)]


def test_deadlines_and_cancels_reach_requests_of_a_client_that_is_away() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5, deadline_ms=300)
    client.submit(6, deadline_ms=300)
    client.submit(7)
    client.cut()
    bench.sleep(400)
    assert worker.aborted() == [(5, 0)]
    assert [line.request for line in worker.dispatched()] == [5, 7]
    again = client.back()
    again.cancel(7)
    assert worker.aborted() == [(7, 0)]
    assert again.codes() == {(7, 0): CANCELLED}
    bench.check_rest()


def test_to_say_it_again_is_to_claim_it() -> None:
    """A client that does not know whether its SUBMIT arrived may send it again on the next connection."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.cut()
    again = client.back()
    again.submit(5)
    assert worker.grants() == [(5, 0, 0, True, again.number)]
    worker.end(11, (5, 0), client=again.number)
    assert again.codes() == {(5, 0): 0}
    assert len(worker.dispatched()) == 1


def test_a_claim_of_a_later_attempt_ends_the_former_one() -> None:
    """Its SUBMIT was lost with the connection."""
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.cut()
    again = client.back((5, 1, 0))
    assert again.codes() == {(5, 1): LOST}
    assert worker.aborted() == [(5, 0)]
    again.submit(5, 2)
    assert [(line.request, line.attempt) for line in worker.dispatched()] == [(5, 0), (5, 2)]


def test_a_client_that_loses_its_connection_again_keeps_what_it_claimed() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    client.cut()
    second = client.back((5, 0, 1))
    second.cut()
    assert worker.aborted() == [(6, 0)]
    third = client.back((5, 0, 2), (6, 0, 0))
    assert third.codes() == {(6, 0): LOST}
    worker.grants()
    worker.end(11, (5, 0), client=third.number)
    assert third.codes() == {(5, 0): 0}
    bench.check_rest()


def test_who_is_away_gives_way_to_who_comes() -> None:
    bench = Bench(clients_max=2)
    worker, first = bench.worker(), bench.client(11)
    bench.client(12)
    first.submit(5)
    first.cut()
    assert bench.client(13).refusal is None
    assert worker.aborted() == [(5, 0)]
    assert bench.client(14).refusal == QuotaExceededError.code


def test_credit_of_a_client_reaches_only_what_it_reads() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.cut()
    again = client.back()
    again.send(Credit([CreditLine(request=5, attempt=0, next=50, window=2**32 - 1, again=True)]))
    assert worker.grants() == []
    again.claim((5, 0, 0))
    again.send(Credit([CreditLine(request=5, attempt=0, next=50, window=2**32 - 1, again=True)]))
    # Nobody but the controller says that a stream begins again.
    assert worker.grants() == [(5, 0, 0, True, again.number), (5, 0, 50, False, again.number)]


# ── the worker's connection ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_worker_is_told_at_once_with_the_time_for_claims() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    (end,) = client.terminals()
    assert (end.request, end.attempt, end.code) == (5, 0, WorkerLostError.code)
    assert end.details == {"worker": "w", "claim_ms": CLAIM_MS}


def test_a_worker_that_leaves_comes_back_with_nothing() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.leave()
    (end,) = client.terminals()
    assert end.details == {"worker": "w"}
    client.claim((5, 0, 0))
    assert client.codes() == {(5, 0): LOST}


@pytest.mark.parametrize("first", ["claim", "return"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_claim_and_a_returning_worker_meet_in_any_order(first: str, finished: bool) -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5, deadline_ms=60_000)
    worker.cut()
    client.terminals()
    carried = carried_of(11, 5, lock=lock_of(SECRET), finished=finished)
    bench.sleep(500)
    if first == "claim":
        client.claim((5, 0, 7))
        bench.sleep(500)
        again = worker.back(carried, slots=1)
    else:
        again = worker.back(carried, slots=1)
        bench.sleep(500)
        assert again.aborted() == []
        client.claim((5, 0, 7))
    assert again.grants() == [(5, 0, 7, True, client.number)]
    assert bench.broker.registry.workers["w"].in_flight == (not finished)
    bench.sleep(10_000)
    again.load()
    again.say(client.number, 5, 0, "further")
    again.end(11, (5, 0), client=client.number)
    assert client.texts() == ["further"]
    assert client.codes() == {(5, 0): 0}
    assert bench.broker.recovery.matched == 1
    bench.check_rest()


def test_a_claim_in_vain_ends_for_good() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    client.terminals()
    client.claim((5, 0, 7))
    bench.sleep(CLAIM_MS - 100)
    assert client.terminals() == []
    bench.sleep(200)
    (end,) = client.terminals()
    assert end.code == WorkerLostError.code
    assert "claim_ms" not in end.details
    client.claim((5, 0, 7))
    assert client.codes() == {(5, 0): LOST}
    bench.check_rest()


def test_what_nobody_claims_of_a_returning_worker_is_stopped() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    again = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    bench.sleep(CLAIM_MS - 100)
    assert again.aborted() == []
    bench.sleep(200)
    assert again.aborted() == [(5, 0)]
    bench.check_rest()


def test_the_next_attempt_ends_the_wait_for_the_former_one() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    other = bench.worker("other", instance=2)
    client.submit(5)
    lost, left = (worker, other) if worker.dispatched() else (other, worker)
    lost.cut()
    client.submit(5, 1, resume_from=3)
    assert [line.attempt for line in left.dispatched()] == [1]
    again = lost.back(carried_of(11, 5, lock=lock_of(SECRET)))
    assert again.aborted() == [(5, 0)]
    left.end(11, (5, 1))
    assert client.codes() == {(5, 0): WorkerLostError.code, (5, 1): 0}
    bench.check_rest()


def test_an_unwanted_stream_is_stopped_at_once_where_its_worker_is_back_already() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    again = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    client.submit(5, 1)
    assert again.aborted() == [(5, 0)]
    assert [line.attempt for line in again.dispatched()] == [1]


def test_only_the_worker_that_was_lost_brings_a_stream_back() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    client.terminals()
    client.claim((5, 0, 0))
    lock = lock_of(SECRET)
    for name, instance, shown in (("w2", 1, lock), ("w", 2, lock), ("w", 1, b"")):
        pretender = bench.worker(name, instance=instance, carried=[carried_of(11, 5, lock=shown)])
        assert pretender.aborted() == [(5, 0)]
        pretender.leave()
    again = worker.back(carried_of(11, 5, lock=lock))
    assert again.grants() == [(5, 0, 0, True, client.number)]


def test_carried_requests_may_come_in_several_messages_and_twice() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.submit(6)
    worker.cut()
    client.claim((5, 0, 0), (6, 0, 0))
    five, six = (carried_of(11, number, lock=lock_of(SECRET)) for number in (5, 6))
    again = worker.back(five, five)
    again.carry(six, six, five)
    assert [line[:4] for line in again.grants()] == [(5, 0, 0, True), (6, 0, 0, True)]
    assert again.aborted() == []
    client.terminals()
    again.end(11, (5, 0), (6, 0))
    assert client.codes() == {(5, 0): 0, (6, 0): 0}
    bench.check_rest()


def test_an_attempt_that_nobody_takes_leaves_the_lost_one_to_be_claimed() -> None:
    bench = Bench()
    models = [model_of("m", "generate")]
    worker, client = bench.worker(models=models), bench.client(secret=SECRET)
    other = bench.worker("other", instance=2, models=models)
    client.submit(5)
    (holder,) = [peer for peer in (worker, other) if peer.dispatched()]
    holder.cut()
    client.terminals()
    client.submit(5, 1, resume_from=3)
    (end,) = client.terminals()
    assert end.details["resumable"] is False
    client.claim((5, 0, 3))
    again = holder.back(carried_of(11, 5, lock=lock_of(SECRET)))
    assert again.grants() == [(5, 0, 3, True, client.number)]
    assert again.aborted() == []
    again.end(11, (5, 0), client=client.number)
    assert client.codes() == {(5, 0): 0}
    bench.check_rest()


def test_an_attempt_that_waits_for_a_host_leaves_the_lost_one_to_be_claimed() -> None:
    bench = Bench()
    models = [model_of("m", "generate")]
    worker, client = bench.worker(models=models), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    client.terminals()
    client.submit(5, 1, resume_from=3)
    assert client.terminals() == []
    again = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    (end,) = client.terminals()
    assert end.details["resumable"] is False
    client.claim((5, 0, 3))
    assert again.grants() == [(5, 0, 3, True, client.number)]
    again.end(11, (5, 0), client=client.number)
    assert client.codes() == {(5, 0): 0}
    bench.check_rest()


def test_what_a_worker_brings_back_in_vain_holds_its_slot_until_it_has_stopped() -> None:
    bench = Bench()
    worker, client = bench.worker(slots=1), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    client.submit(5, 1)
    again = FakeWorker(bench)
    again.slow = True
    again.hello("w", slots=1, carried=[carried_of(11, 5, lock=lock_of(SECRET))])
    assert again.aborted() == [(5, 0)]
    assert again.dispatched() == []
    again.end(11, (5, 0), code=CANCELLED)
    assert [dispatch.attempt for dispatch in again.dispatched()] == [1]
    again.end(11, (5, 1))
    bench.check_rest()


def test_a_deadline_holds_while_a_claim_waits_and_after_it_was_matched() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5, deadline_ms=600)
    client.submit(6, deadline_ms=1_000)
    worker.cut()
    client.terminals()
    client.claim((5, 0, 0), (6, 0, 0))
    bench.sleep(700)
    assert client.codes() == {(5, 0): DeadlineExceededError.code}
    again = worker.back(carried_of(11, 6, lock=lock_of(SECRET)))
    bench.sleep(400)
    assert client.codes() == {(6, 0): DeadlineExceededError.code}
    assert again.aborted() == [(6, 0)]
    bench.check_rest()


def test_a_claim_can_be_cancelled() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    client.terminals()
    client.claim((5, 0, 0))
    client.cancel(5)
    assert client.codes() == {(5, 0): CANCELLED}
    again = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    bench.sleep(CLAIM_MS + 100)
    assert again.aborted() == [(5, 0)]
    bench.check_rest()


def test_a_controller_that_drains_lets_a_lost_stream_go_on_elsewhere() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    other = bench.worker("other", instance=2)
    bench.broker.drain(bench.now_ns)
    worker.cut()
    # The next attempt is on its way.
    assert not bench.broker.drained(bench.now_ns)
    client.submit(5, 1, resume_from=3)
    assert [line.attempt for line in other.dispatched()] == [1]
    client.submit(6)
    assert client.codes() == {(5, 0): WorkerLostError.code, (6, 0): NoWorkerError.code}
    other.end(11, (5, 1))
    assert client.codes() == {(5, 1): 0}
    assert bench.broker.drained(bench.now_ns)


def test_a_claim_in_vain_leaves_its_place_to_the_next_attempt() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    worker.cut()
    # Another attempt waits and ends, so that the first one is claimed after all.
    client.submit(5, 1, resume_from=3)
    client.cancel(5)
    client.claim((5, 0, 3))
    client.terminals()
    bench.sleep(CLAIM_MS + 100)
    assert client.codes() == {(5, 0): WorkerLostError.code}
    other = bench.worker("other", instance=2)
    bench.broker.drain(bench.now_ns)
    client.submit(5, 1, resume_from=3)
    assert [line.attempt for line in other.dispatched()] == [1]


@pytest.mark.parametrize("code", [0, WorkerDrainingError.code])
def test_a_drain_waits_for_another_attempt_only_where_there_may_be_one(code: int) -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    bench.broker.drain(bench.now_ns)
    worker.end(11, (5, 0), code=code)
    assert bench.broker.drained(bench.now_ns) is not bool(code)
    bench.sleep(CLAIM_MS + 1)
    assert bench.broker.drained(bench.now_ns)


# ── both, and the controller ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", ["client", "worker"])
def test_both_connections_are_lost_and_both_come_back(first: str) -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    lines = [worker, client] if first == "worker" else [client, worker]
    for peer in lines:
        peer.cut()
    bench.sleep(300)
    if first == "worker":
        back = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
        again = client.back((5, 0, 4))
    else:
        again = client.back((5, 0, 4))
        back = worker.back(carried_of(11, 5, lock=lock_of(SECRET)))
    assert back.grants() == [(5, 0, 4, True, again.number)]
    back.end(11, (5, 0), client=again.number)
    assert again.codes() == {(5, 0): 0}
    bench.check_rest()


def test_a_new_controller_lets_everybody_come_back_once() -> None:
    bench = Bench(recovery_ms=3_000)
    lock = lock_of(SECRET)
    client = bench.client(secret=SECRET, claims=[claim_of(5, 0, 2), claim_of(6, 0, 0)])
    worker = bench.worker(carried=[carried_of(11, 5, lock=lock), carried_of(11, 7, lock=lock)])
    assert worker.grants() == [(5, 0, 2, True, client.number)]
    bench.sleep(2_900)
    assert (worker.aborted(), client.codes()) == ([], {})
    bench.sleep(200)
    assert worker.aborted() == [(7, 0)]
    assert client.codes()[6, 0] == LOST
    client.claim((7, 0, 0))
    assert client.codes() == {(7, 0): LOST}
    worker.end(11, (5, 0), client=client.number)
    bench.check_rest()


def test_a_worker_that_is_lost_while_the_controller_is_new_has_its_time_too() -> None:
    bench = Bench(recovery_ms=3_000)
    lock = lock_of(SECRET)
    client = bench.client(secret=SECRET, claims=[claim_of(5, 0, 2)])
    worker = bench.worker(carried=[carried_of(11, 5, lock=lock)])
    bench.sleep(2_500)
    worker.cut()
    (end,) = client.terminals()
    assert end.details["claim_ms"] == CLAIM_MS
    client.claim((5, 0, 2))
    bench.sleep(1_000)
    again = worker.back(carried_of(11, 5, lock=lock))
    assert again.grants() == [(5, 0, 2, True, client.number)]


def test_one_request_that_two_workers_carry_goes_to_the_one_that_has_the_lock() -> None:
    bench = Bench(recovery_ms=3_000)
    thief = bench.worker("thief", instance=9, carried=[carried_of(11, 5, lock=b"guess")])
    worker = bench.worker(carried=[carried_of(11, 5, lock=lock_of(SECRET))])
    client = bench.client(secret=SECRET, claims=[claim_of(5, 0, 2)])
    assert worker.grants() == [(5, 0, 2, True, client.number)]
    assert thief.grants() == []
    assert thief.aborted() == [(5, 0)]
    worker.end(11, (5, 0), client=client.number)
    bench.check_rest()


def test_a_claim_needs_the_secret_of_the_request() -> None:
    """After a restart the controller knows nobody; whoever has seen both numbers still cannot take the stream."""
    bench = Bench(recovery_ms=3_000)
    worker = bench.worker(carried=[carried_of(11, 5, lock=lock_of(SECRET))])
    for secret in (b"", b"guessed", lock_of(SECRET)):
        thief = bench.client(11, secret=secret, claims=[claim_of(5, 0, 0)])
        assert worker.grants() == []
        thief.leave()
    client = bench.client(11, secret=SECRET, claims=[claim_of(5, 0, 0)])
    assert worker.grants() == [(5, 0, 0, True, client.number)]


@pytest.mark.parametrize("moment", ["restart", "worker lost", "client lost"])
def test_a_claim_gives_no_more_than_the_key_may_use(moment: str) -> None:
    bench = Bench(recovery_ms=3_000)
    narrow = Grant("narrow", frozenset({Role.CLIENT}), models=("other-*",))
    lock = lock_of(SECRET)
    if moment == "restart":
        worker = bench.worker(carried=[carried_of(11, 5, lock=lock)])
        client = bench.key_holder(narrow)
        client.hello(11, secret=SECRET, claims=[claim_of(5, 0, 0)])
    else:
        worker, first = bench.worker(), bench.client(secret=SECRET)
        first.submit(5)
        if moment == "worker lost":
            worker.cut()
        first.cut()
        client = bench.key_holder(narrow)
        client.hello(11, secret=SECRET, claims=[claim_of(5, 0, 0)])
        if moment == "worker lost":
            worker = worker.back(carried_of(11, 5, lock=lock))
    assert client.codes() == {(5, 0): PermissionDeniedError.code}
    assert worker.grants() == []


def test_a_claim_may_go_by_an_alias_that_the_key_may_use() -> None:
    bench = Bench(recovery_ms=3_000)
    models = [model_of("llama-3", aliases=["other-chat"])]
    worker = bench.worker(models=models, carried=[carried_of(11, 5, lock=lock_of(SECRET), model="llama-3")])
    client = bench.key_holder(Grant("narrow", frozenset({Role.CLIENT}), models=("other-*",)))
    client.hello(11, secret=SECRET, claims=[claim_of(5, 0, 0)])
    assert worker.grants() == [(5, 0, 0, True, client.number)]


def test_a_call_to_a_worker_is_claimed_by_operators_only() -> None:
    bench = Bench(recovery_ms=3_000)
    worker = bench.worker(carried=[carried_of(11, 5, lock=lock_of(SECRET), operation="operate", model="")])
    client = bench.key_holder(Grant("plain", frozenset({Role.CLIENT})))
    client.hello(11, secret=SECRET, claims=[claim_of(5, 0, 0)])
    assert client.codes() == {(5, 0): PermissionDeniedError.code}
    assert worker.grants() == []


def test_nobody_claims_or_carries_without_bound() -> None:
    bench = Bench(recovery_ms=3_000, client_requests_max=3)
    client = bench.client(claims=[claim_of(number, 0, 0) for number in range(5)])
    assert client.codes() == {(3, 0): QuotaExceededError.code, (4, 0): QuotaExceededError.code}
    bench.sleep(3_100)
    assert set(client.codes()) == {(0, 0), (1, 0), (2, 0)}
    bench.check_rest()


def test_a_terminal_of_any_kind_waits_for_its_reader() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.cut()
    worker.end(11, (5, 0), code=WorkerDrainingError.code)
    again = client.back((5, 0, 0))
    assert worker.grants() == [(5, 0, 0, True, again.number)]
    worker.end(11, (5, 0), code=WorkerDrainingError.code)
    assert again.codes() == {(5, 0): WorkerDrainingError.code}


def test_a_worker_that_is_lost_with_a_finished_answer_for_somebody_away() -> None:
    bench = Bench()
    worker, client = bench.worker(), bench.client(secret=SECRET)
    client.submit(5)
    client.cut()
    worker.end(11, (5, 0))
    worker.cut()
    again = client.back((5, 0, 0))
    back = worker.back(carried_of(11, 5, lock=lock_of(SECRET), finished=True))
    assert back.grants() == [(5, 0, 0, True, again.number)]
    back.end(11, (5, 0), client=again.number)
    assert again.codes() == {(5, 0): 0}
    bench.check_rest()
