"""Who can serve what: a request waits only for those that suit it, and not for ever."""

from __future__ import annotations

import pytest

from tests.peers import FakeFabric, model
from zfabric.errors import (
    NoWorkerError,
    QueueFullError,
    UnknownModelError,
    UnsupportedOperationError,
    WorkerLostError,
)
from zfabric.limits import COMPARED_MAX, MODEL_MEMORY_MS, TURNS_BY_AGE, UNTAKEN_MS
from zfabric.testing.checkers import check_bounds


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric()
    made.client("alice")
    made.client("bob")
    return made


def test_what_waits_for_a_busy_host_is_in_nobodys_way(fabric: FakeFabric) -> None:
    fabric.worker("both", model("m", "generate", "embed"))
    fabric.submit("alice", 1)
    fabric.submit("alice", 2, "embed")
    fabric.worker("plain", model("m", "generate"))
    for number in range(10, 20):
        fabric.submit("bob", number)
        fabric.submit("alice", number + 100)
    for _ in range(20):
        assert fabric.end_all("plain") == 1
    assert [request.request for request in fabric.waiting()] == [2]
    fabric.end("both", "alice", 1)
    assert fabric.taken("both") == [1, 2]


def test_what_waits_for_a_slot_of_its_model_is_in_nobodys_way(fabric: FakeFabric) -> None:
    fabric.worker("w", model("narrow", slots=1), model("wide"), slots=4)
    fabric.submit("alice", 1, model="narrow")
    fabric.submit("alice", 2, model="narrow")
    fabric.submit("bob", 3, model="wide")
    assert fabric.taken("w") == [1, 3]
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == [2]


def test_what_can_only_go_on_elsewhere_is_in_nobodys_way(fabric: FakeFabric) -> None:
    fabric.worker("goes-on", model("m", "generate", "resume"))
    fabric.submit("alice", 1)
    fabric.submit("alice", 2, attempt=1, resume_from=5)
    fabric.worker("begins", model("m", "generate"))
    fabric.submit("bob", 3)
    fabric.submit("bob", 4)
    fabric.end("begins", "bob", 3)
    assert fabric.taken("begins") == [3, 4]
    fabric.end("goes-on", "alice", 1)
    assert fabric.taken("goes-on") == [1, 2]


def test_an_operation_accepted_without_hosts_ends_when_a_host_comes_that_lacks_it(fabric: FakeFabric) -> None:
    fabric.worker("first", model("m", "generate"))
    fabric.lose("first")
    fabric.submit("alice", 1, "embed")
    fabric.submit("alice", 2, attempt=3, resume_from=9)
    fabric.submit("bob", 3)
    assert not fabric.ended("alice")
    fabric.worker("second", model("m", "generate"))
    assert sorted(fabric.ended("alice")) == [(1, UnsupportedOperationError), (2, WorkerLostError)]
    assert fabric.taken("second") == [3]


def test_while_a_controller_is_new_nobody_is_turned_away_for_want_of_a_host() -> None:
    fabric = FakeFabric(recovery_ms=3_000)
    fabric.client("alice")
    fabric.worker("plain", model("m", "generate"))
    fabric.submit("alice", 1, "embed")
    fabric.submit("alice", 2, "count_tokens")
    fabric.submit("alice", 3)
    assert fabric.taken("plain") == [3]
    fabric.worker("late", model("m", "embed"))
    assert fabric.taken("late") == [1]
    assert not fabric.ended("alice")
    fabric.pass_ms(3_100, "plain", "late")
    assert fabric.ended("alice") == [(2, UnsupportedOperationError)]


def test_the_last_host_that_suits_may_be_lost_and_come_back(fabric: FakeFabric) -> None:
    fabric.worker("plain", model("m", "generate"))
    fabric.worker("embedder", model("m", "embed"))
    fabric.submit("alice", 1, "embed")
    fabric.submit("alice", 2, "embed")
    fabric.lose("embedder")
    assert fabric.ended("alice") == [(1, WorkerLostError)]
    fabric.submit("bob", 3, "embed")
    fabric.pass_ms(1_000, "plain")
    fabric.worker("embedder", model("m", "embed"), slots=2)
    assert sorted(fabric.taken("embedder")) == [2, 3]


def test_the_last_host_that_suits_may_be_lost_for_good(fabric: FakeFabric) -> None:
    fabric.worker("plain", model("m", "generate"))
    fabric.worker("embedder", model("m", "embed"))
    fabric.lose("embedder")
    fabric.submit("alice", 1, "embed")
    fabric.pass_ms(MODEL_MEMORY_MS - 1_000, "plain")
    assert not fabric.ended("alice")
    fabric.pass_ms(1_100, "plain")
    assert fabric.ended("alice") == [(1, UnsupportedOperationError)]
    fabric.submit("alice", 2, "embed")
    assert fabric.ended("alice") == [(2, UnsupportedOperationError)]


def test_a_host_that_says_that_it_cannot_any_more_is_believed(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", "generate", "embed", "resume"))
    fabric.submit("alice", 1)
    fabric.submit("alice", 2, "embed")
    fabric.submit("alice", 3, attempt=1, resume_from=4)
    fabric.submit("alice", 4)
    fabric.worker("w", model("m", "generate"), again=True)
    assert sorted(fabric.ended("alice")) == [(2, UnsupportedOperationError), (3, WorkerLostError)]
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == [1, 4]


def test_what_somebody_began_is_lost_and_not_unsupported(fabric: FakeFabric) -> None:
    """Its worker may come back with it, which the word for what nobody supports would rule out."""
    fabric.worker("w", model("m", "embed"))
    fabric.submit("alice", 1, attempt=1, resume_from=4)
    fabric.submit("alice", 2)
    assert sorted(fabric.ended("alice")) == [(1, WorkerLostError), (2, UnsupportedOperationError)]


def test_a_capability_that_comes_later_is_used_at_once(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", "generate"), slots=2)
    fabric.worker("e", model("m", "embed"))
    fabric.submit("alice", 1, "embed")
    fabric.submit("alice", 2, "embed")
    fabric.worker("w", model("m", "generate", "embed"), slots=2, again=True)
    assert fabric.taken("w") == [2]


def test_a_full_queue_of_one_operation_keeps_no_other_out() -> None:
    fabric = FakeFabric(queue_depth_max=3)
    fabric.client("alice")
    fabric.client("bob")
    fabric.worker("both", model("m", "generate", "embed"))
    fabric.worker("plain", model("m", "generate"), slots=2)
    for number in range(3):
        fabric.submit("bob", number)
    for number in range(10, 14):
        fabric.submit("alice", number, "embed")
    assert fabric.ended("alice") == [(13, QueueFullError)]
    # One waits although the other's queue is full, and one that can go at once does not ask for a queue at all.
    fabric.submit("bob", 4)
    assert not fabric.ended("bob")
    assert fabric.end_all("plain") == 2
    assert fabric.taken("plain") == [4]


@pytest.mark.parametrize("how", ["draining", "no slots", "hung"])
def test_hosts_that_take_nothing_make_nobody_wait_for_ever(how: str) -> None:
    fabric = FakeFabric(stall_ms=5_000)
    fabric.client("alice")
    fabric.worker("w", model())
    fabric.submit("alice", 1)
    beats(fabric, how, 5_000)
    fabric.ended("alice")
    fabric.submit("alice", 2)
    fabric.submit("alice", 3, "embed")
    beats(fabric, how, UNTAKEN_MS - 6_000)
    assert not fabric.ended("alice")
    beats(fabric, how, 8_000)
    assert sorted(fabric.ended("alice")) == [(2, NoWorkerError), (3, NoWorkerError)]
    fabric.submit("alice", 4)
    assert fabric.ended("alice") == [(4, NoWorkerError)]
    if how == "hung":
        fabric.end("w", "alice", 1)
    if how != "draining":
        fabric.load("w", slots=2, progress=1)
        fabric.submit("alice", 5)
        assert 5 in fabric.taken("w")
    assert not fabric.waiting()
    check_bounds(fabric.broker)


def beats(fabric: FakeFabric, how: str, duration_ms: int) -> None:
    for _ in range(duration_ms // 1_000):
        fabric.pass_ms(1_000, "w")
        fabric.load("w", slots=0 if how == "no slots" else 1, draining=how == "draining")


def test_hosts_that_come_and_go_without_taking_anything_make_nobody_wait_for_ever(fabric: FakeFabric) -> None:
    """Each loss would be waited for anew, but not more often than a whole drain and a restart take."""
    fabric.worker("w", model(), draining=True)
    fabric.submit("alice", 1)
    for _ in range(UNTAKEN_MS // 5_000):
        assert not fabric.ended("alice")
        fabric.pass_ms(2_500, "w")
        fabric.lose("w")
        fabric.pass_ms(2_500)
        fabric.worker("w", model(), draining=True)
    assert fabric.ended("alice") == [(1, NoWorkerError)]


def test_a_model_without_hosts_is_remembered_for_a_while(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.lose("w")
    fabric.submit("alice", 1)
    fabric.submit("alice", 2, "embed")
    fabric.pass_ms(MODEL_MEMORY_MS + 100)
    assert sorted(fabric.ended("alice")) == [(1, NoWorkerError), (2, NoWorkerError)]
    fabric.submit("alice", 3)
    assert fabric.ended("alice") == [(3, UnknownModelError)]
    assert not fabric.broker.registry.models
    assert not len(fabric.broker.timers)


def test_priorities_make_nobody_wait_for_ever(fabric: FakeFabric) -> None:
    """One client keeps the queue full of urgent requests; another's least urgent one is served all the same."""
    fabric.worker("w", model())
    number = 10
    for number in range(10, 20):
        fabric.submit("alice", number, priority=-1_000)
    fabric.submit("bob", 1, priority=1_000)
    served = 0
    while not fabric.ended("bob"):
        served += fabric.end_all("w")
        number += 1
        fabric.submit("alice", number, priority=-1_000)
        assert served <= TURNS_BY_AGE * 12
    assert served > TURNS_BY_AGE


def test_priorities_go_first_but_for_the_turns_of_age(fabric: FakeFabric) -> None:
    fabric.worker("w", model())
    fabric.submit("alice", 0)
    for number in range(1, 9):
        fabric.submit("alice", number, priority=number % 3)
    order = []
    for _ in range(9):
        order += fabric.taken("w")
        fabric.end("w", "alice", order[-1])
    assert order == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_a_long_line_for_one_model_delays_another_model_at_the_worker_by_one(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a"), model("b"))
    for number in range(10, 110):
        fabric.submit("alice", number, model="a")
    fabric.submit("bob", 1, model="b")
    fabric.submit("bob", 2, "embed", model="b")
    served = 0
    while len(fabric.terminals.get("bob", [])) < 2:
        served += fabric.end_all("w")
    assert served <= 6


def test_of_a_great_many_models_none_waits_for_ever(fabric: FakeFabric) -> None:
    """More than are compared for one choice; some are asked for without end, by urgent requests."""
    names = [f"m{number}" for number in range(3 * COMPARED_MAX)]
    fabric.worker("w", *map(model, names))
    number = 0
    for name in names:
        number += 1
        fabric.submit("alice", number, model=name, priority=-5)
    fabric.submit("bob", 1, model=names[-1], priority=5)
    served = 0
    while not fabric.ended("bob"):
        served += fabric.end_all("w")
        number += 1
        fabric.submit("alice", number, model=names[number % 7], priority=-5)
        assert served < 40 * COMPARED_MAX


def test_queues_keep_nothing_of_what_has_left(fabric: FakeFabric) -> None:
    fabric.worker("w", model("m", aliases=["n"]), slots=3)
    for number in range(20):
        fabric.submit("alice", number, ("generate", "embed")[number % 2], model="mn"[number % 2], priority=number % 3)
    fabric.cancel("alice", *range(3, 20))
    fabric.end_all("w")
    assert not fabric.waiting()
    queues = fabric.broker.scheduler.queues
    assert not queues._waiting
    assert not queues._asked
    assert not fabric.broker.scheduler.figures.queued_bytes
    assert not any(known.asked for known in fabric.broker.registry.models.values())
