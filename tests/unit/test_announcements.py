"""What a worker announces is what it serves: more, less, otherwise, or nothing."""

from __future__ import annotations

import pytest

from tests.peers import FakeFabric, model
from zfabric.core.controller.access import Grant, Role
from zfabric.errors import NoWorkerError, PermissionDeniedError, ProtocolError, UnknownModelError
from zfabric.limits import MODEL_MEMORY_MS
from zfabric.testing.checkers import check_bounds, check_rest


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric()
    made.client("alice")
    return made


def test_a_worker_may_serve_nothing(fabric: FakeFabric) -> None:
    fabric.worker("w", slots=2)
    assert fabric.query("alice", "workers")[0]["models"] == []
    fabric.submit("alice", 1)
    assert fabric.ended("alice") == [(1, UnknownModelError)]
    fabric.worker("w", model("m"), again=True)
    fabric.submit("alice", 2)
    assert fabric.taken("w") == [2]


def test_a_worker_that_drops_all_models_ends_what_it_runs(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a"), model("b"))
    fabric.submit("alice", 1, model="a")
    fabric.submit("alice", 2, model="b")
    fabric.worker("w", again=True)
    assert not fabric.ended("alice")
    assert fabric.broker.registry.workers["w"].in_flight == 1
    fabric.submit("alice", 3, model="a")
    fabric.end("w", "alice", 1)
    assert fabric.ended("alice") == [(1, None)]
    fabric.pass_ms(MODEL_MEMORY_MS + 100, "w")
    assert sorted(fabric.ended("alice")) == [(2, NoWorkerError), (3, NoWorkerError)]
    assert fabric.taken("w") == [1]
    assert not fabric.broker.registry.models
    check_rest(fabric.broker)


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_runs_of_a_model_counts_when_it_is_served_again(fabric: FakeFabric, forgotten: bool) -> None:
    fabric.worker("w", model("a", slots=2), slots=4)
    fabric.submit("alice", 1, model="a")
    fabric.submit("alice", 2, model="a")
    fabric.worker("w", slots=4, again=True)
    if forgotten:
        fabric.pass_ms(MODEL_MEMORY_MS + 100, "w")
    fabric.worker("w", model("a", slots=2), slots=4, again=True)
    fabric.submit("alice", 3, model="a")
    assert fabric.taken("w") == [1, 2]
    check_bounds(fabric.broker)
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == [3]
    fabric.end("w", "alice", 2)
    fabric.end("w", "alice", 3)
    check_rest(fabric.broker)
    assert fabric.broker.registry.workers["w"].hosts["a"].in_flight == 0


def test_slots_of_a_model_change(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a", slots=1), slots=4)
    for number in range(6):
        fabric.submit("alice", number, model="a")
    assert fabric.taken("w") == [0]
    fabric.worker("w", model("a", slots=3), slots=4, again=True)
    assert fabric.taken("w") == [1, 2]
    fabric.worker("w", model("a", slots=0), slots=4, again=True)
    assert fabric.taken("w") == [3]
    fabric.worker("w", model("a", slots=2), slots=4, again=True)
    for number in range(2):
        fabric.end("w", "alice", number)
    assert not fabric.taken("w")
    fabric.end("w", "alice", 2)
    assert fabric.taken("w") == [4]


def test_slots_of_a_worker_change(fabric: FakeFabric) -> None:
    fabric.worker("w", model(), slots=2)
    for number in range(6):
        fabric.submit("alice", number)
    fabric.load("w", slots=4)
    assert fabric.taken("w") == [0, 1, 2, 3]
    fabric.load("w", slots=1)
    for number in range(3):
        fabric.end("w", "alice", number)
    assert not fabric.taken("w")
    fabric.end("w", "alice", 3)
    assert fabric.taken("w") == [4]
    check_bounds(fabric.broker)


def test_two_models_of_one_name_are_refused_and_cost_nothing(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a"), model("b"))
    fabric.submit("alice", 1, model="a")
    fabric.worker("w", model("c"), model("c"), again=True)
    assert fabric.faults == [ProtocolError]
    assert sorted(fabric.broker.registry.workers["w"].hosts) == ["a", "b"]
    fabric.submit("alice", 2, model="b")
    fabric.end("w", "alice", 1)
    assert fabric.taken("w") == [1, 2]
    fabric.worker("x", model("c"), model("c"))
    assert fabric.refusals == [ProtocolError]
    assert "x" not in fabric.broker.registry.workers


def test_a_model_that_the_key_may_not_serve_costs_none_that_it_may(fabric: FakeFabric) -> None:
    grant = Grant("key", frozenset({Role.WORKER, Role.CLIENT}), models=("a", "b"))
    fabric.worker("w", model("a"))
    fabric.broker.grant_of = lambda _: grant
    fabric.worker("w", model("a"), model("b", aliases=["secret"]), again=True)
    assert fabric.faults == [PermissionDeniedError]
    fabric.worker("w", model("a"), model("b"), again=True)
    assert sorted(fabric.broker.registry.workers["w"].hosts) == ["a", "b"]


def test_a_worker_that_says_the_same_again_changes_nothing(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a", aliases=["x"]), slots=2)
    fabric.submit("alice", 1, model="a")
    before = fabric.query("alice", "models")
    for _ in range(3):
        fabric.worker("w", model("a", aliases=["x"]), slots=2, again=True)
    assert fabric.query("alice", "models") == before
    assert fabric.broker.registry.workers["w"].hosts["a"].in_flight == 1
    assert not len(fabric.broker.registry.changed)
