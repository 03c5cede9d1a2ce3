"""No event costs what somebody has piled up before: four times as much of anything takes four times as long in all.

Lines of the core that run are counted, so nothing here depends on a machine or its load. What hides in a single line, such as
a search through a list, is counted as well: comparing requests is counted, and so are the sizes of what is copied.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import zfabric.core
from tests.peers import FakeFabric, model
from zfabric.core.controller import (
    endings,
    fair_queue,
    hosting,
    names,
    outbox,
    queues,
    ranking,
    recovery,
    registry,
    scheduler,
    sessions,
)
from zfabric.core.controller.peers import Request
from zfabric.limits import CLAIM_MS, MODEL_MEMORY_MS, QUEUE_DEPTH_MAX

CORE = str(Path(zfabric.core.__file__).parent)
#: Where copies are counted too; these do not ask whether something is a list.
COUNTED = (scheduler, endings, hosting, names, outbox, fair_queue, queues, ranking, recovery, registry, sessions)
Scenario = Callable[[FakeFabric, int], None]
SCENARIOS: dict[str, Scenario] = {}
#: Linear is 4, n log n a little more, quadratic 16.
RATIO_MAX = 5.5


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def queue(fabric: FakeFabric, count: int, **values: Any) -> list[int]:
    """One request that runs, and others that wait behind it, in the order in which they came."""
    fabric.worker("w", model("m", aliases=["n"]))
    fabric.submit("alice", 0)
    numbers = list(range(1, count + 1))
    for number in numbers:
        fabric.submit("alice", number, **values)
    return numbers


@scenario
def the_last_is_cancelled_first(fabric: FakeFabric, count: int) -> None:
    fabric.cancel("alice", *reversed(queue(fabric, count)))


@scenario
def all_are_cancelled_in_any_order(fabric: FakeFabric, count: int) -> None:
    numbers = queue(fabric, count)
    random.Random(1).shuffle(numbers)
    for number in numbers:
        fabric.cancel("alice", number)


@scenario
def the_middle_is_cancelled_first(fabric: FakeFabric, count: int) -> None:
    numbers = queue(fabric, count)
    fabric.cancel("alice", *numbers[count // 2 :], *numbers[: count // 2])


@scenario
def all_are_cancelled_from_many_lines(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", model("m", aliases=["n"]))
    for number in range(count):
        operation: Any = ("generate", "embed")[number % 2]
        priority = number % 2_001 - 1_000
        fabric.submit("alice", number, operation, priority=priority, model="mn"[number % 3 % 2])
    fabric.cancel("alice", *reversed(range(count)))


@scenario
def a_client_leaves(fabric: FakeFabric, count: int) -> None:
    queue(fabric, count)
    fabric.leave("alice")


@scenario
def a_client_is_lost(fabric: FakeFabric, count: int) -> None:
    queue(fabric, count)
    fabric.lose("alice")
    fabric.pass_ms(CLAIM_MS + 500, "w")


@scenario
def a_model_is_given_up(fabric: FakeFabric, count: int) -> None:
    queue(fabric, count)
    fabric.leave("w")
    fabric.pass_ms(MODEL_MEMORY_MS + 500)


@scenario
def a_capability_is_given_up(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", model("m", "embed"))
    for number in range(count):
        fabric.submit("alice", number, "embed")
    fabric.worker("w", model("m", "generate"), again=True)


@scenario
def all_deadlines_pass_at_once(fabric: FakeFabric, count: int) -> None:
    queue(fabric, count, deadline_ms=1_000)
    fabric.pass_ms(1_500, "w")


@scenario
def a_name_moves(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", model("m", aliases=["n"]))
    for number in range(count):
        fabric.submit("alice", number, model="n")
    fabric.worker("x", model("other", aliases=["n"]))
    fabric.leave("w")


@scenario
def a_queue_is_worked_off(fabric: FakeFabric, count: int) -> None:
    queue(fabric, count)
    while fabric.end_all("w"):
        pass


@scenario
def a_queue_of_many_lines_is_worked_off(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", model("m", aliases=["n"]))
    for number in range(count):
        fabric.submit("alice", number, priority=number % 500)
    while fabric.end_all("w"):
        pass


@scenario
def a_worker_with_many_requests_is_lost_and_all_come_again(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", model(), slots=count)
    for number in range(count):
        fabric.submit("alice", number)
    fabric.lose("w")
    fabric.worker("v", model())
    for number in reversed(range(count)):
        fabric.submit("alice", number, attempt=1)
    fabric.pass_ms(CLAIM_MS + 500, "v")


@scenario
def requests_that_wait_are_submitted_again(fabric: FakeFabric, count: int) -> None:
    numbers = queue(fabric, count)
    for number in reversed(numbers):
        fabric.submit("alice", number, attempt=1)


@scenario
def a_worker_with_many_models_comes_and_goes(fabric: FakeFabric, count: int) -> None:
    for _ in range(3):
        fabric.worker("w", *(model(f"m{number}", aliases=[f"n{number}", "all"]) for number in range(count)))
        fabric.worker("w", *(model(f"m{number}", aliases=[f"o{number}"]) for number in range(count)), again=True)
        fabric.lose("w")
    fabric.pass_ms(2 * MODEL_MEMORY_MS)


@scenario
def requests_for_many_models_are_worked_off(fabric: FakeFabric, count: int) -> None:
    fabric.worker("w", *(model(f"m{number}") for number in range(count)), slots=2)
    for number in range(count):
        fabric.submit("alice", number, model=f"m{number}")
    while fabric.end_all("w"):
        pass


@scenario
def many_workers_come_and_go(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.worker(f"w{number}", model("m", aliases=["n"]), slots=2)
        fabric.submit("alice", number)
        fabric.submit("alice", count + number, "embed")
    for number in range(count):
        fabric.lose(f"w{number}")


@scenario
def many_models_share_an_alias_and_the_holder_leaves_first(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.worker(f"w{number}", model(f"m{number}", aliases=["all"]))
    for number in reversed(range(count)):
        fabric.submit("alice", number, model="all")
        fabric.leave(f"w{number}")
    fabric.pass_ms(MODEL_MEMORY_MS + 500)


@scenario
def workers_that_share_an_alias_flap(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.worker(f"w{number}", model(f"m{number}", aliases=["all"]))
    for number in range(count):
        fabric.lose(f"w{number}")
        fabric.submit("alice", number, model="all")
        fabric.worker(f"w{number}", model(f"m{number}", aliases=["all"]))


@scenario
def a_new_controller_is_asked_for_names_that_nobody_serves(fabric: FakeFabric, count: int) -> None:
    fabric.broker.scheduler.queues.recovering = True
    for number in range(count):
        fabric.submit("alice", number, model=f"nobody-{number}")
        fabric.worker(f"w{number}", model("m", aliases=[f"a{number}"]))
    fabric.broker.scheduler.queues.recovered()
    fabric.pass_ms(MODEL_MEMORY_MS + 500)


@scenario
def all_hosts_stop_taking_requests(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.worker(f"w{number}", model())
    for number in range(count):
        fabric.load(f"w{number}", draining=True)
        fabric.submit("alice", number)
    fabric.submit("alice", count)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts lines of the core that run, comparisons of requests, and items of what is copied by `list`."""
    count = [0]

    def local(frame: FrameType, event: str, argument: object) -> Any:
        count[0] += event == "line"
        return local

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(CORE) else None

    def equal(self: Request, other: object) -> bool:
        count[0] += 1
        return self is other

    def copying(kind: Any) -> Any:
        def copy(*items: Any) -> Any:
            made = kind(*items)
            count[0] += len(made)
            return made

        return copy

    with monkeypatch.context() as patch:
        patch.setattr(Request, "__eq__", equal)
        patch.setattr(Request, "__hash__", object.__hash__)
        for module in COUNTED:
            for kind in (list, sorted):
                patch.setattr(module, kind.__name__, copying(kind), raising=False)
        sys.settrace(trace)
        try:
            yield count
        finally:
            sys.settrace(None)


def cost(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> int:
    fabric = FakeFabric()
    fabric.client("alice")
    with counted(monkeypatch) as count:
        SCENARIOS[name](fabric, size)
    return count[0]


@pytest.mark.parametrize("name", SCENARIOS)
def test_four_times_as_much_costs_four_times_as_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = cost(name, 150, monkeypatch), cost(name, 600, monkeypatch)
    assert small > 150
    assert large < RATIO_MAX * small, f"{large / small:.1f} times the cost for four times the size"


BURDENS: dict[str, Scenario] = {}


def burden(function: Scenario) -> Scenario:
    BURDENS[function.__name__] = function
    return function


@burden
def one_line(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.submit("alice", number)


@burden
def many_priorities(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.submit("alice", number, priority=number % 2_001 - 1_000)


@burden
def many_models(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.submit("alice", number, model=f"m{number % 600}")


@burden
def what_nobody_can_do_now(fabric: FakeFabric, count: int) -> None:
    for number in range(count):
        fabric.submit("alice", number, attempt=1, resume_from=3)


@burden
def what_left_the_queue(fabric: FakeFabric, count: int) -> None:
    one_line(fabric, count)
    fabric.cancel("alice", *range(1, count - 1))


@pytest.mark.parametrize("name", BURDENS)
def test_what_one_client_has_queued_makes_no_step_of_another_dearer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with 600 models; bob's requests, one after the other, while alice has few or many waiting."""
    costs = []
    for size in (150, 600):
        fabric = FakeFabric()
        fabric.client("alice")
        fabric.client("bob")
        models = [model(f"m{number}", "generate") for number in range(600)]
        fabric.worker("w", model("m", "generate", slots=1), *models, slots=2)
        fabric.worker("resumes", model("m", "generate", "resume"), draining=True)
        fabric.submit("bob", 10_000)
        BURDENS[name](fabric, size)
        with counted(monkeypatch) as count:
            for number in range(10_001, 10_041):
                fabric.submit("bob", number)
                fabric.load("w", slots=2)
                fabric.end_all("w")
                fabric.submit("bob", number + 1_000)
                fabric.cancel("bob", number + 1_000)
        costs.append(count[0])
    assert costs[1] < 1.5 * costs[0]


def test_the_count_finds_what_is_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that searches its line for what is to be removed, as `deque.remove` does."""
    original = fair_queue.FairQueue.remove

    def remove(self: Any, item: Any) -> None:
        self.items().index(item)
        original(self, item)

    monkeypatch.setattr(fair_queue.FairQueue, "remove", remove)
    name = "the_last_is_cancelled_first"
    assert cost(name, 600, monkeypatch) > RATIO_MAX * cost(name, 150, monkeypatch)


def test_what_left_a_full_queue_holds_no_memory() -> None:
    fabric = FakeFabric()
    fabric.client("alice")
    fabric.cancel("alice", *queue(fabric, QUEUE_DEPTH_MAX // 8)[:-1])
    (known,) = fabric.broker.registry.models.values()
    (part,) = known.queue._parts.values()
    (line,) = part.lines.values()
    assert len(part.by_arrival) == len(line.items) == 1
    assert len(part.by_arrival._heap) < 100
    assert len(line.items._heap) < 100
