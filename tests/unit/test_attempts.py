"""What an attempt may claim from the one before, and that nobody is believed about it."""

from __future__ import annotations

import pytest

from tests.peers import FakeFabric, model
from zfabric.errors import (
    DeadlineExceededError,
    NoWorkerError,
    ProtocolError,
    QueueFullError,
    WorkerDrainingError,
    WorkerLostError,
)
from zfabric.limits import CLAIM_MS, FORMER_ATTEMPTS_MAX
from zfabric.testing.checkers import check_bounds, check_rest


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric(queue_depth_max=3)
    made.client("alice")
    made.client("bob")
    return made


def in_order(fabric: FakeFabric, worker: str) -> list[int]:
    """The requests that a worker gets one by one."""
    order: list[int] = []
    while taken := fabric.dispatches[worker]:
        order.append(taken[0].request)
        fabric.end_all(worker)
    return order


def test_an_attempt_that_follows_none_has_no_privilege(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("bob", 1)
    for number in range(2, 5):
        fabric.submit("alice", number)
    for number in range(10, 20):
        fabric.submit("alice", number, attempt=1)
        fabric.submit("bob", number, attempt=999)
    assert {error for _, error in fabric.ended("alice")} == {QueueFullError}
    assert {error for _, error in fabric.ended("bob")} == {QueueFullError}
    assert in_order(fabric, "w") == [1, 2, 3, 4]


def test_the_oldest_is_never_overtaken_by_higher_attempts() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model())
    for number in range(4):
        fabric.submit("alice", number)
    for number in range(10, 14):
        fabric.submit("alice", number, attempt=1)
    assert in_order(fabric, "w") == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("how", ["lost", "hands back"])
def test_what_a_worker_lost_keeps_its_place(fabric: FakeFabric, how: str) -> None:
    fabric.worker("w", model())
    fabric.worker("v", model())
    fabric.submit("alice", 1)
    fabric.submit("alice", 2)
    for number in range(3, 6):
        fabric.submit("alice", number)
    victim = "w" if fabric.dispatches["w"][0].request == 1 else "v"
    other = {"v": "w", "w": "v"}[victim]
    if how == "lost":
        fabric.lose(victim)
        assert fabric.ended("alice") == [(1, WorkerLostError)]
    else:
        fabric.load(victim, draining=True)
        fabric.end(victim, "alice", 1, code=WorkerDrainingError.code)
        fabric.leave(victim)
    fabric.submit("alice", 1, attempt=1)
    # The queue is at its bound, and this one waited before.
    assert [terminal.error for terminal in fabric.terminals.get("alice", [])] in ([], [WorkerDrainingError])
    fabric.submit("alice", 9, attempt=1)
    assert fabric.ended("alice")[-1] == (9, QueueFullError)
    assert in_order(fabric, other) == [2, 1, 3, 4, 5]
    check_rest(fabric.broker)


def test_a_loss_gives_one_privilege(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    fabric.lose("w")
    fabric.worker("w", model())
    for number in range(2, 6):
        fabric.submit("bob", number)
    fabric.submit("alice", 1, attempt=1)
    fabric.cancel("alice", 1)
    fabric.ended("alice")
    fabric.submit("alice", 1, attempt=2)
    assert fabric.ended("alice") == [(1, QueueFullError)]


def test_a_request_that_waits_is_replaced_in_its_place(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("bob", 1)
    for number in range(2, 5):
        fabric.submit("alice", number)
    for attempt in range(1, 5):
        fabric.submit("alice", 2, attempt=attempt)
    assert not fabric.ended("alice")
    assert len(fabric.waiting()) == 3
    assert in_order(fabric, "w") == [1, 2, 3, 4]


def test_a_request_that_runs_leaves_no_room_in_the_queue(fabric: FakeFabric) -> None:
    """One after the other is made to run and submitted again: the queue does not grow beyond its bound by that."""
    fabric.worker("w", model(), slots=2)
    for number in range(5):
        fabric.submit("alice", number)
    assert fabric.taken("w") == [0, 1]
    fabric.submit("alice", 0, attempt=1)
    fabric.submit("alice", 1, attempt=1)
    assert fabric.ended("alice") == [(0, QueueFullError), (1, QueueFullError)]
    fabric.end("w", "alice", 0)
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == [2, 3]
    check_bounds(fabric.broker)


def test_the_same_attempt_again_is_ignored_while_it_is_known(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 1, attempt=1)
    fabric.submit("alice", 2, attempt=1)
    for _ in range(5):
        fabric.submit("alice", 1, attempt=1)
        fabric.submit("alice", 2, attempt=1)
    assert not fabric.ended("alice")
    assert fabric.taken("w") == [1]
    fabric.end("w", "alice", 1, 1)
    fabric.end("w", "alice", 2, 1)
    assert fabric.ended("alice") == [(1, None), (2, None)]
    check_rest(fabric.broker)


def test_a_lower_attempt_is_told_that_it_was_replaced_and_the_later_one_goes_on(fabric: FakeFabric) -> None:
    """Whether the later one runs or waits."""
    fabric.worker("w", model())
    fabric.submit("alice", 1, attempt=2)
    fabric.submit("alice", 2, attempt=2)
    fabric.submit("alice", 1, attempt=0)
    fabric.submit("alice", 2, attempt=1)
    assert fabric.ended("alice") == [(1, ProtocolError), (2, ProtocolError)]
    assert fabric.taken("w") == [1]
    fabric.end("w", "alice", 1, 2)
    fabric.end("w", "alice", 2, 2)
    assert fabric.ended("alice") == [(1, None), (2, None)]
    check_rest(fabric.broker)


def live(fabric: FakeFabric) -> list[tuple[str, int, int]]:
    """What is in the workers' hands: worker, request, attempt."""
    workers = fabric.broker.registry.workers
    return [(name, request, attempt) for name in workers for _, request, attempt in workers[name].live]


@pytest.mark.parametrize("how", ["deadline", "another session", "higher attempt"])
def test_an_attempt_that_a_worker_still_has_is_not_begun_a_second_time(fabric: FakeFabric, how: str) -> None:
    fabric.worker("w", model(), slots=4)
    fabric.submit("alice", 1, deadline_ms=100)
    fabric.worker("v", model(), slots=4)
    if how == "deadline":
        fabric.pass_ms(200, "w", "v")
        assert fabric.ended("alice") == [(1, DeadlineExceededError)]
    elif how == "another session":
        fabric.leave("alice")
        fabric.client("alice")
    else:
        fabric.submit("alice", 1, attempt=1)
        assert live(fabric) == [("w", 1, 0), ("v", 1, 1)]
        fabric.end("v", "alice", 1, 1)
        assert fabric.ended("alice") == [(1, None)]
    assert live(fabric) == [("w", 1, 0)]
    fabric.submit("alice", 1)
    assert fabric.ended("alice") == [(1, ProtocolError)]
    assert live(fabric) == [("w", 1, 0)]
    fabric.end("w", "alice", 1)
    assert not live(fabric)
    assert not fabric.broker.registry.live
    fabric.ended("alice")
    fabric.submit("alice", 1)
    ((name, *_),) = live(fabric)
    fabric.end(name, "alice", 1)
    assert fabric.ended("alice") == [(1, None)]
    check_rest(fabric.broker)


def test_an_attempt_that_was_lost_with_its_worker_has_had_its_terminal(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 1, attempt=2)
    fabric.lose("w")
    fabric.worker("w", model())
    fabric.ended("alice")
    for attempt in (0, 1, 2, 2):
        fabric.submit("alice", 1, attempt=attempt)
    assert fabric.ended("alice") == [(1, ProtocolError)] * 2 + [(1, WorkerLostError)] * 2
    fabric.submit("alice", 1, attempt=3)
    assert fabric.taken("w") == [1]


def test_a_controller_that_drains_takes_what_it_took_before(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.worker("v", model())
    fabric.submit("alice", 1)
    victim, other = ("w", "v") if fabric.dispatches["w"] else ("v", "w")
    fabric.broker.drain(fabric.now_ns)
    fabric.lose(victim)
    fabric.ended("alice")
    assert not fabric.broker.drained(fabric.now_ns)
    fabric.submit("alice", 1, attempt=1, resume_from=3)
    assert fabric.taken(other) == [1]
    fabric.submit("alice", 2)
    fabric.submit("alice", 3, attempt=1)
    assert fabric.ended("alice") == [(2, NoWorkerError), (3, NoWorkerError)]
    fabric.end(other, "alice", 1, 1)
    assert fabric.broker.drained(fabric.now_ns)


def test_a_controller_that_drains_does_not_wait_for_who_does_not_come(fabric: FakeFabric) -> None:
    fabric.worker("w", model(), slots=3)
    for number in range(3):
        fabric.submit("alice", number)
    fabric.broker.drain(fabric.now_ns)
    fabric.lose("w")
    assert not fabric.broker.drained(fabric.now_ns)
    fabric.pass_ms(CLAIM_MS + 100)
    assert fabric.broker.drained(fabric.now_ns)


def test_former_attempts_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zfabric.core.controller.peers.FORMER_ATTEMPTS_MAX", 10)
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.worker("w", model(), slots=100)
    for number in range(100):
        fabric.submit("alice", number)
    fabric.lose("w")
    client = fabric.broker.registry.clients[fabric.instances["alice"]]
    assert list(client.former) == list(range(90, 100))
    assert FORMER_ATTEMPTS_MAX > 1_000
    fabric.worker("w", model(), slots=100)
    for number in range(100):
        fabric.submit("alice", number, attempt=1)
    assert not client.former
