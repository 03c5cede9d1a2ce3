"""An alias belongs to whoever serves it now."""

from __future__ import annotations

import itertools

import pytest

from tests.peers import FakeFabric, model
from zfabric.errors import NoWorkerError, UnknownModelError, UnsupportedOperationError, WorkerLostError
from zfabric.limits import MODEL_MEMORY_MS


@pytest.fixture
def fabric() -> FakeFabric:
    made = FakeFabric()
    made.client("alice")
    return made


numbers = itertools.count(1_000)


def served_by(fabric: FakeFabric, name: str) -> str | None:
    """Where a request for a name goes, and that the listing says so as well."""
    number = next(numbers)
    listed = {row["name"]: [row["name"], *row["aliases"]] for row in fabric.query("alice", "models")}
    fabric.submit("alice", number, model=name)
    for worker in list(fabric.broker.registry.workers):
        for dispatch in fabric.dispatches[worker]:
            if dispatch.request == number:
                fabric.end(worker, "alice", number)
                assert [known for known, names in listed.items() if name in names] == [dispatch.model]
                return dispatch.model
    assert fabric.ended("alice")[-1] == (number, UnknownModelError)
    assert not any(name in names for names in listed.values())
    return None


def test_blue_and_green(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    assert served_by(fabric, "chat") == "v1"
    fabric.worker("green", model("v2", aliases=["chat"]))
    assert served_by(fabric, "chat") == "v2"
    assert served_by(fabric, "v1") == "v1"
    fabric.leave("blue")
    assert served_by(fabric, "chat") == "v2"
    fabric.pass_ms(2 * MODEL_MEMORY_MS, "green")
    assert served_by(fabric, "chat") == "v2"
    assert served_by(fabric, "v1") is None


def test_and_back_to_blue(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.worker("green", model("v2", aliases=["chat"]))
    fabric.worker("green", model("v2"), again=True)
    assert served_by(fabric, "chat") == "v1"
    fabric.worker("green", model("v2", aliases=["chat"]), again=True)
    assert served_by(fabric, "chat") == "v2"
    fabric.leave("green")
    assert served_by(fabric, "chat") == "v1"


def test_who_comes_back_does_not_take_an_alias_back(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.worker("green", model("v2", aliases=["chat"]))
    fabric.lose("blue")
    fabric.pass_ms(1_000, "green")
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.worker("blue-2", model("v1", aliases=["chat"]))
    assert served_by(fabric, "chat") == "v2"


def test_a_name_is_a_model_first(fabric: FakeFabric) -> None:
    fabric.worker("a", model("chat"))
    fabric.worker("b", model("llama", aliases=["chat"]))
    assert served_by(fabric, "chat") == "chat"
    fabric.lose("a")
    assert served_by(fabric, "chat") == "llama"
    fabric.worker("a", model("chat"))
    assert served_by(fabric, "chat") == "chat"


def test_an_alias_that_is_dropped_is_gone_at_once(fabric: FakeFabric) -> None:
    fabric.worker("w", model("v1", aliases=["chat", "v1"]))
    fabric.worker("w2", model("v1", aliases=["chat"]))
    fabric.worker("w", model("v1"), again=True)
    assert served_by(fabric, "chat") == "v1"
    fabric.worker("w2", model("v1", aliases=["other"]), again=True)
    assert served_by(fabric, "chat") is None
    assert served_by(fabric, "other") == "v1"


def test_an_alias_whose_worker_was_lost_is_remembered_for_a_while(fabric: FakeFabric) -> None:
    fabric.worker("w", model("v1"))
    fabric.worker("named", model("v1", aliases=["chat"]))
    fabric.lose("named")
    fabric.pass_ms(MODEL_MEMORY_MS - 1_000, "w")
    assert served_by(fabric, "chat") == "v1"
    fabric.pass_ms(MODEL_MEMORY_MS + 1_500, "w")
    assert served_by(fabric, "chat") is None


def test_no_name_is_kept_for_ever(fabric: FakeFabric) -> None:
    """Each deployment has aliases of its own; some are dropped, some are lost, under models that stay and that go."""
    fabric.worker("stays", model("m"))
    for number in range(40):
        fabric.worker(
            "w", model("m", aliases=[f"lost-{number}"]), model(f"m-{number}", aliases=[f"x-{number}", "chat"])
        )
        fabric.worker("w", model("m", aliases=[f"dropped-{number}"]), model("other", aliases=["chat"]), again=True)
        fabric.lose("w")
        fabric.pass_ms(5_000, "stays")
    fabric.pass_ms(3 * MODEL_MEMORY_MS, "stays")
    registry = fabric.broker.registry
    assert list(registry.models) == ["m"]
    assert len(registry._names) == 1
    assert not registry.models["m"].aliases
    assert not registry.models["m"].unheld
    assert not registry.changed
    assert not registry.held


def test_what_waits_under_an_alias_moves_with_it(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.submit("alice", 1, model="chat")
    for number in range(2, 6):
        fabric.submit("alice", number, ("generate", "embed")[number % 2], model=("chat", "v1")[number // 4])
    fabric.worker("green", model("v2", "generate", aliases=["chat"]), slots=8)
    assert not fabric.taken("green")
    fabric.leave("blue")
    assert fabric.taken("green") == [2]
    assert sorted(fabric.ended("alice")) == [(1, WorkerLostError), (3, UnsupportedOperationError)]
    fabric.pass_ms(MODEL_MEMORY_MS + 500, "green")
    assert sorted(fabric.ended("alice")) == [(4, NoWorkerError), (5, NoWorkerError)]


def test_what_waits_moves_when_somebody_comes_for_its_name(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.leave("blue")
    for number in range(3):
        fabric.submit("alice", number, model=("chat", "v1")[number % 2])
    fabric.worker("green", model("v2", aliases=["chat", "spare"]), slots=8)
    assert fabric.taken("green") == [0, 2]
    fabric.worker("green", model("v2", aliases=["chat", "v1"]), slots=8, again=True)
    assert fabric.taken("green") == [1]


def test_what_is_asked_of_a_new_controller_under_an_alias_finds_its_model() -> None:
    fabric = FakeFabric(recovery_ms=3_000)
    fabric.client("alice")
    fabric.submit("alice", 1, model="chat")
    fabric.submit("alice", 2, model="nobody")
    fabric.worker("w", model("v1", aliases=["chat"]))
    assert fabric.taken("w") == [1]
    fabric.pass_ms(6_500, "w")
    assert fabric.ended("alice") == [(2, NoWorkerError)]
    assert list(fabric.broker.registry.models) == ["v1"]


def test_an_answer_goes_on_with_the_model_that_began_it(fabric: FakeFabric) -> None:
    """The tokens so far are those of one model: another that has its alias now cannot go on with them."""
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.worker("blue-2", model("v1", aliases=["chat"]))
    fabric.submit("alice", 1, model="chat")
    first = "blue" if fabric.taken("blue") else "blue-2"
    second = {"blue": "blue-2", "blue-2": "blue"}[first]
    fabric.taken(second)
    fabric.worker("green", model("v2", aliases=["chat"]))
    fabric.lose(first)
    fabric.submit("alice", 1, attempt=1, resume_from=7, model="chat")
    assert fabric.taken(second) == [1]
    fabric.lose(second)
    # Nothing was read of this one: it may begin anew wherever the name is served.
    fabric.submit("alice", 1, attempt=2, model="chat")
    assert fabric.taken("green") == [1]


def test_an_answer_waits_for_the_model_that_began_it_and_for_no_other(fabric: FakeFabric) -> None:
    fabric.worker("blue", model("v1", aliases=["chat"]))
    fabric.submit("alice", 1, model="chat")
    fabric.lose("blue")
    fabric.ended("alice")
    fabric.submit("alice", 1, attempt=1, resume_from=7, model="chat")
    fabric.submit("alice", 2, model="chat")
    fabric.worker("green", model("v2", aliases=["chat"]), slots=4)
    assert fabric.taken("green") == [2]
    fabric.worker("blue", model("v1", aliases=["chat"]))
    assert fabric.taken("blue") == [1]
    fabric.lose("blue")
    fabric.ended("alice")
    fabric.pass_ms(MODEL_MEMORY_MS + 500, "green")
    fabric.submit("alice", 1, attempt=2, resume_from=9, model="chat")
    ((request, attempt, error, details),) = fabric.terminals["alice"]
    assert (request, attempt, error, details["resumable"]) == (1, 2, WorkerLostError, False)


def test_the_name_of_a_call_to_one_worker_is_the_model_there(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a", aliases=["chat"]), model("b"))
    fabric.submit("alice", 1, "operate", model="b", worker="w")
    fabric.submit("alice", 2, "operate", model="chat", worker="w")
    fabric.submit("alice", 3, "operate", model="", worker="w")
    fabric.submit("alice", 4, "operate", model="c", worker="w")
    assert [(call.request, call.model) for call in fabric.dispatches["w"]] == [(1, "b"), (2, "a"), (3, "")]
    assert fabric.ended("alice") == [(4, UnknownModelError)]


def test_one_worker_is_asked_for_what_it_can_do_now(fabric: FakeFabric) -> None:
    fabric.worker("w", model("a", "generate"), slots=1)
    fabric.submit("alice", 1, "embed", model="a", worker="w")
    fabric.submit("alice", 2, model="", worker="w")
    fabric.submit("alice", 3, model="a", worker="w")
    fabric.submit("alice", 4, model="a", worker="w")
    fabric.submit("alice", 5, "operate", model="a", worker="w")
    assert fabric.taken("w") == [3, 5]
    assert fabric.ended("alice") == [(1, UnsupportedOperationError), (2, UnknownModelError), (4, NoWorkerError)]
    assert fabric.broker.registry.workers["w"].hosts["a"].in_flight == 1
