"""Adapters on demand: who is asked to load one, who gives its place up, and that what waits for one is served or told why not."""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec import structs

from tests.peers import FakeFabric, model
from zfabric.core.controller.access import Grant, Role
from zfabric.core.controller.adapter_host import hosts_wanted
from zfabric.core.controller.dispatch import POLICIES, Ask, register_policy, shortest_queue
from zfabric.errors import (
    NoWorkerError,
    PermissionDeniedError,
    RequestError,
    UnknownModelError,
    UnsupportedOperationError,
)
from zfabric.ids import RoutingId
from zfabric.limits import (
    ADAPTER_COLD_MS,
    ADAPTER_LOAD_MS,
    ADAPTER_RETRY_MS,
    ADAPTER_TURN_MS,
    MODEL_MEMORY_MS,
)
from zfabric.testing.checkers import check_bounds, check_liveness
from zfabric.wire.messages import Dispatch, ModelInfo


class Farm:
    """Workers of one base, which obey the controller's calls when the test says so, and one client."""

    def __init__(
        self, *workers: str, offers: tuple[str, ...] = ("a", "b", "c"), slots: int = 4, **settings: Any
    ) -> None:
        self.fabric = FakeFabric(**{"stall_ms": 10**9, **settings})
        self.slots = slots
        self.loaded: dict[str, list[str]] = {}
        self.offers = dict.fromkeys(workers, offers)
        #: What each worker was given and has not ended: adapter's name and request's number.
        self.running: dict[str, list[tuple[str, int]]] = {}
        self.calls: dict[str, list[tuple[str, str, Dispatch]]] = {}
        self.number = 0
        self.fabric.client("alice")
        for name in workers:
            self.join(name)

    def join(self, name: str, *loaded: str, again: bool = False, draining: bool = False) -> None:
        if not again:
            self.loaded[name], self.running[name], self.calls[name] = list(loaded), [], []
        self.fabric.worker(name, *self._infos(name), slots=self.slots, again=again, draining=draining)
        self.sort()

    def _infos(self, name: str) -> list[ModelInfo]:
        base = structs.replace(model("base"), loadable=list(self.offers[name]))
        return [base, *(model(adapter, "generate") for adapter in self.loaded[name])]

    def ask(self, adapter: str, **values: Any) -> int:
        self.number += 1
        self.fabric.submit("alice", self.number, model=adapter, **values)
        self.sort()
        return self.number

    def sort(self) -> None:
        """Tell the controller's calls from requests."""
        for name, dispatches in self.fabric.dispatches.items():
            for dispatch in dispatches:
                if dispatch.operation == "operate":
                    assert dispatch.model == "base"
                    call, adapter = self.fabric.calls.pop((name, dispatch.request))
                    self.calls[name].append((call, adapter, dispatch))
                else:
                    self.running[name].append((dispatch.model, dispatch.request))
            dispatches.clear()

    def asked(self, name: str) -> list[tuple[str, str]]:
        """The calls that a worker has not done."""
        return [(call, adapter) for call, adapter, _ in self.calls[name]]

    def obey(self, name: str, code: int = 0, *, announced_first: bool = True) -> None:
        """A worker does the oldest call, or fails."""
        call, adapter, dispatch = self.calls[name].pop(0)
        if call == "unload_adapter" and adapter not in self.loaded[name]:
            code = UnknownModelError.code
        if not code:
            if call == "load_adapter":
                self.loaded[name].append(adapter)
            else:
                assert adapter not in [one for one, _ in self.running[name]], "unloaded with running requests"
                self.loaded[name].remove(adapter)
            if announced_first:
                self.join(name, again=True)
        self.fabric.instances["controller"] = dispatch.instance
        self.fabric.end(name, "controller", dispatch.request, code=code)
        if not code and not announced_first:
            self.join(name, again=True)
        self.sort()

    def end(self, name: str, adapter: str) -> None:
        """A worker ends the oldest request of an adapter."""
        number = next(number for model, number in self.running[name] if model == adapter)
        self.running[name].remove((adapter, number))
        self.fabric.end(name, "alice", number)
        self.sort()

    def pass_ms(self, duration_ms: float) -> None:
        self.fabric.pass_ms(duration_ms, *(name for name in self.loaded if name in self.fabric.broker.registry.workers))
        self.sort()

    def check(self) -> None:
        check_bounds(self.fabric.broker)
        check_liveness(self.fabric.broker, list(self.loaded))
        most = self.fabric.broker.config.adapters_per_host
        for name, loaded in self.loaded.items():
            coming = sum(call == "load_adapter" for call, _ in self.asked(name))
            assert len(loaded) + coming <= most
            assert len(self.calls[name]) <= 1


@pytest.mark.parametrize("announced_first", [True, False])
def test_a_request_for_an_offered_adapter_waits_until_a_worker_has_loaded_it(announced_first: bool) -> None:
    farm = Farm("w")
    number = farm.ask("a")
    assert farm.asked("w") == [("load_adapter", "a")]
    assert farm.fabric.ended("alice") == []
    farm.obey("w", announced_first=announced_first)
    assert farm.running["w"] == [("a", number)]
    farm.end("w", "a")
    assert farm.fabric.ended("alice") == [(number, None)]
    farm.check()


def test_a_name_that_nobody_offers_is_unknown_and_reaches_no_worker() -> None:
    farm = Farm("w")
    for name in ("../a", "/etc/passwd", "a/../b", "d"):
        number = farm.ask(name)
        assert farm.fabric.ended("alice") == [(number, UnknownModelError)]
    assert farm.asked("w") == []


def test_nothing_is_loaded_where_the_rule_is_off() -> None:
    farm = Farm("w", adapters_per_host=0)
    number = farm.ask("a")
    assert farm.fabric.ended("alice") == [(number, UnknownModelError)]
    assert farm.asked("w") == []


def test_who_waits_is_told_that_it_is_being_loaded() -> None:
    farm = Farm("w")
    farm.ask("a")
    (row,) = farm.fabric.query("alice", "requests")["rows"]
    assert row["reason"] == "loading"


def test_a_load_may_take_longer_than_a_model_is_remembered() -> None:
    farm = Farm("w")
    number = farm.ask("a")
    farm.pass_ms(min(ADAPTER_LOAD_MS - 1_000, 2 * MODEL_MEMORY_MS))
    assert farm.fabric.ended("alice") == []
    farm.obey("w")
    assert farm.running["w"] == [("a", number)]


def test_the_deadline_of_what_waits_for_a_load_holds() -> None:
    farm = Farm("w")
    number = farm.ask("a", deadline_ms=100)
    farm.pass_ms(200)
    assert [ended for ended, _ in farm.fabric.ended("alice")] == [number]


def test_what_the_adapter_cannot_do_ends_once_it_is_loaded() -> None:
    farm = Farm("w")
    number = farm.ask("a", operation="embed")
    farm.obey("w")
    assert farm.fabric.ended("alice") == [(number, UnsupportedOperationError)]


def test_the_least_loaded_worker_is_asked() -> None:
    farm = Farm("busy", "free")
    farm.ask("base")
    (busy,) = [name for name in farm.running if farm.running[name]]
    (free,) = {"busy", "free"} - {busy}
    farm.ask("a")
    assert farm.asked(busy) == []
    assert farm.asked(free) == [("load_adapter", "a")]


@pytest.mark.parametrize(("demand", "spread", "wanted"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3)])
def test_hosts_grow_with_demand(demand: int, spread: int, wanted: int) -> None:
    assert hosts_wanted(demand, spread) == wanted


def test_more_demand_brings_one_more_host_and_no_more_than_there_are() -> None:
    farm = Farm("v", "w", adapter_spread=2)
    farm.ask("a")
    (first,) = [name for name in farm.calls if farm.calls[name]]
    (other,) = {"v", "w"} - {first}
    farm.obey(first)
    farm.ask("a")
    assert farm.asked(other) == []
    farm.ask("a")
    assert farm.asked(other) == [("load_adapter", "a")]
    farm.obey(other)
    for _ in range(8):
        farm.ask("a")
    assert farm.asked(first) == farm.asked(other) == []
    farm.check()


def test_the_least_recently_used_adapter_makes_room() -> None:
    farm = Farm("w", adapters_per_host=2)
    for adapter in ("a", "b", "a"):
        farm.ask(adapter)
        if farm.calls["w"]:
            farm.obey("w")
        farm.end("w", adapter)
    number = farm.ask("c")
    assert farm.asked("w") == [("unload_adapter", "b")]
    late = farm.ask("b")
    farm.obey("w")
    assert farm.asked("w") == [("load_adapter", "c")]
    farm.obey("w")
    assert farm.running["w"] == [("c", number)]
    # Idle by now, and asked for in between: the one that was used the longest ago goes for it.
    assert farm.asked("w") == [("unload_adapter", "a")]
    farm.obey("w")
    farm.obey("w")
    assert farm.running["w"] == [("c", number), ("b", late)]
    farm.check()


def test_an_adapter_in_use_gives_way_after_its_turn_and_only_when_its_last_request_has_ended() -> None:
    farm = Farm("w", adapters_per_host=1, slots=2)
    farm.ask("a")
    farm.obey("w")
    farm.ask("a")
    farm.ask("b")
    assert farm.asked("w") == []
    farm.pass_ms(ADAPTER_TURN_MS + 2_000)
    assert farm.asked("w") == []
    farm.end("w", "a")
    later = farm.ask("a")
    assert [name for name, _ in farm.running["w"]] == ["a"]
    farm.end("w", "a")
    assert farm.asked("w") == [("unload_adapter", "a")]
    farm.obey("w")
    farm.obey("w")
    assert [name for name, _ in farm.running["w"]] == ["b"]
    farm.end("w", "b")
    farm.pass_ms(2_000)
    farm.obey("w")
    farm.obey("w")
    assert farm.running["w"] == [("a", later)]
    farm.check()


def test_an_idle_adapter_is_unloaded_and_one_in_use_is_not() -> None:
    farm = Farm("w", adapter_idle_ms=10_000)
    for adapter in ("a", "b"):
        farm.ask(adapter)
        farm.obey("w")
    farm.end("w", "a")
    farm.pass_ms(9_000)
    assert farm.asked("w") == []
    farm.pass_ms(3_000)
    assert farm.asked("w") == [("unload_adapter", "a")]
    farm.obey("w")
    farm.pass_ms(30_000)
    assert farm.asked("w") == []
    assert farm.loaded["w"] == ["b"]


def test_what_comes_while_an_adapter_is_unloaded_has_it_loaded_again() -> None:
    farm = Farm("w", adapter_idle_ms=10_000)
    farm.ask("a")
    farm.obey("w")
    farm.end("w", "a")
    farm.pass_ms(12_000)
    number = farm.ask("a")
    assert farm.running["w"] == []
    farm.obey("w")
    farm.obey("w")
    assert farm.running["w"] == [("a", number)]


def test_an_unload_that_fails_gives_the_adapter_back() -> None:
    farm = Farm("w", adapter_idle_ms=10_000)
    farm.ask("a")
    farm.obey("w")
    farm.end("w", "a")
    farm.pass_ms(12_000)
    number = farm.ask("a")
    farm.obey("w", code=RequestError.code)
    assert farm.running["w"] == [("a", number)]
    farm.check()


def test_a_load_that_fails_is_tried_elsewhere_and_then_ends_what_waits() -> None:
    farm = Farm("v", "w")
    number = farm.ask("a")
    (first,) = [name for name in farm.calls if farm.calls[name]]
    (other,) = {"v", "w"} - {first}
    farm.obey(first, code=RequestError.code)
    assert farm.asked(first) == []
    assert farm.asked(other) == [("load_adapter", "a")]
    assert farm.fabric.ended("alice") == []
    farm.obey(other, code=RequestError.code)
    assert farm.fabric.ended("alice") == [(number, NoWorkerError)]
    again = farm.ask("a")
    assert farm.fabric.ended("alice") == [(again, NoWorkerError)]
    farm.pass_ms(ADAPTER_RETRY_MS + 1)
    farm.ask("a")
    assert farm.asked("v") + farm.asked("w") == [("load_adapter", "a")]


def test_a_load_without_end_is_stopped_and_its_worker_is_asked_nothing_else_until_it_has() -> None:
    farm = Farm("w")
    number = farm.ask("a")
    farm.pass_ms(ADAPTER_LOAD_MS + 1)
    assert farm.fabric.ended("alice") == [(number, NoWorkerError)]
    farm.ask("b")
    assert farm.asked("w") == [("load_adapter", "a")]
    farm.obey("w", code=RequestError.code)
    assert farm.asked("w") == [("load_adapter", "b")]


def test_a_worker_that_is_lost_while_it_loads_is_replaced_by_another() -> None:
    farm = Farm("v", "w")
    number = farm.ask("a")
    (first,) = [name for name in farm.calls if farm.calls[name]]
    (other,) = {"v", "w"} - {first}
    farm.fabric.lose(first)
    farm.sort()
    assert farm.asked(other) == [("load_adapter", "a")]
    farm.obey(other)
    assert farm.running[other] == [("a", number)]


def test_a_worker_that_drains_is_not_asked() -> None:
    farm = Farm("w")
    farm.join("w", again=True, draining=True)
    farm.ask("a")
    assert farm.asked("w") == []
    farm.join("w", again=True)
    assert farm.asked("w") == [("load_adapter", "a")]


def test_what_waits_where_all_workers_drain_ends_in_time() -> None:
    farm = Farm("w")
    farm.join("w", again=True, draining=True)
    number = farm.ask("a")
    farm.pass_ms(2 * MODEL_MEMORY_MS + 10_000)
    assert farm.fabric.ended("alice") == [(number, NoWorkerError)]


def test_a_paused_adapter_is_not_loaded_before_it_is_resumed() -> None:
    farm = Farm("w", adapter_idle_ms=5_000)
    farm.ask("a")
    farm.obey("w")
    farm.end("w", "a")
    farm.fabric.client("operator")
    farm.fabric.query("operator", "pause", model="a")
    farm.pass_ms(7_000)
    farm.obey("w")
    farm.ask("a")
    assert farm.asked("w") == []
    farm.fabric.query("operator", "resume", model="a")
    farm.sort()
    assert farm.asked("w") == [("load_adapter", "a")]


def test_a_new_controller_learns_what_is_loaded_from_announcements() -> None:
    farm = Farm(adapter_idle_ms=5_000, adapters_per_host=1)
    farm.offers["w"] = ("a", "b")
    farm.join("w", "a")
    number = farm.ask("a")
    assert farm.running["w"] == [("a", number)]
    farm.end("w", "a")
    farm.ask("b")
    assert farm.asked("w") == [("unload_adapter", "a")]


def test_a_key_that_may_not_ask_a_model_has_it_not_loaded() -> None:
    farm = Farm("w")
    grant = Grant("alice", frozenset(Role), models=("base", "b"))
    everybody = farm.fabric.broker.grant_of

    def grant_of(peer: RoutingId) -> Grant:
        return grant if peer.startswith(b"alice") else everybody(peer)

    farm.fabric.broker.grant_of = grant_of
    farm.fabric.broker.review_keys(farm.fabric.now_ns)
    refused = farm.ask("a")
    assert farm.fabric.ended("alice") == [(refused, PermissionDeniedError)]
    assert farm.asked("w") == []
    farm.ask("b")
    assert farm.asked("w") == [("load_adapter", "b")]


def test_a_worker_may_offer_no_model_that_its_key_does_not_allow() -> None:
    fabric = FakeFabric()
    fabric.broker.grant_of = lambda _: Grant("w", frozenset({Role.WORKER}), models=("base", "a"))
    fabric.worker("w", structs.replace(model("base"), loadable=["a", "b"]))
    assert fabric.refusals == [PermissionDeniedError]


def test_a_policy_is_told_what_a_cold_host_would_cost() -> None:
    seen: list[float] = []

    def curious(ask: Ask) -> Any:
        seen.append(ask.cold_s())
        return shortest_queue(ask)

    register_policy("curious", curious)
    try:
        farm = Farm("v", "w", policy="curious")
        farm.ask("base")
        farm.ask("a")
        (first,) = [name for name in farm.calls if farm.calls[name]]
        farm.pass_ms(3_000)
        farm.obey(first)
        farm.ask("a")
        farm.fabric.lose(({"v", "w"} - {first}).pop())
        farm.ask("a")
    finally:
        del POLICIES["curious"]
    assert seen == [0.0, ADAPTER_COLD_MS / 1_000, 0.0]


@pytest.mark.parametrize("seed", range(8))
def test_random_demand_keeps_the_bounds_and_all_of_it_is_served(seed: int) -> None:
    rng = random.Random(seed)
    names = tuple("abcdef")
    farm = Farm(offers=names, slots=3, adapters_per_host=2, adapter_idle_ms=20_000, adapter_spread=3)
    for worker in ("u", "v", "w"):
        farm.offers[worker] = tuple(rng.sample(names, 4)) if worker != "u" else names
        farm.join(worker)
    asked: set[int] = set()
    for _ in range(400):
        step = rng.random()
        if step < 0.4:
            asked.add(farm.ask(rng.choice(names)))
        elif step < 0.7:
            _end_one(farm, rng)
        elif step < 0.9:
            _obey_one(farm, rng)
        else:
            farm.pass_ms(rng.choice((10, 1_000, 5_000)))
        farm.check()
    for _ in range(2_000):
        if not farm.fabric.waiting() and not any(farm.running.values()):
            break
        _end_one(farm, rng)
        _obey_one(farm, rng)
        farm.pass_ms(500)
        farm.check()
    served = dict(farm.fabric.ended("alice"))
    assert served == dict.fromkeys(asked)


@pytest.mark.parametrize("seed", range(12))
def test_whoever_comes_and_goes_and_fails_nothing_is_broken_and_every_request_ends(seed: int) -> None:
    """Workers are lost and come back, change what they offer, drain and fail; a model is paused and resumed."""
    rng = random.Random(seed)
    names = tuple("abcde")
    farm = Farm("u", "v", offers=names, adapters_per_host=2, adapter_idle_ms=15_000, adapter_spread=2)
    farm.fabric.client("operator")
    asked: set[int] = set()
    for _ in range(300):
        step = rng.random()
        worker = rng.choice(("u", "v"))
        if step < 0.35:
            asked.add(farm.ask(rng.choice((*names, "base")), deadline_ms=rng.choice((None, 5_000))))
        elif step < 0.55:
            _end_one(farm, rng)
        elif step < 0.75:
            _obey_one(farm, rng, code=rng.choice((0, 0, RequestError.code)))
        elif step < 0.8:
            farm.pass_ms(rng.choice((1_000, 5_000, ADAPTER_LOAD_MS)))
        elif step < 0.85:
            farm.offers[worker] = tuple(rng.sample(names, rng.randint(0, 5)))
            farm.loaded[worker] = [name for name in farm.loaded[worker] if rng.random() < 0.8]
            farm.join(worker, again=True, draining=rng.random() < 0.3)
        elif step < 0.9:
            farm.fabric.lose(worker)
            farm.join(worker, *rng.sample(names, rng.randint(0, 2)))
        else:
            model = farm.fabric.broker.registry.find(rng.choice(names))
            if model is not None:
                farm.fabric.query("operator", rng.choice(("pause", "resume")), model=model.name)
                farm.sort()
        check_bounds(farm.fabric.broker)
        check_liveness(farm.fabric.broker, list(farm.loaded))
        assert max(map(len, farm.calls.values())) <= 1
    for worker in ("u", "v"):
        farm.fabric.lose(worker)
        farm.sort()
    farm.pass_ms(60 * 60_000)
    assert not farm.fabric.waiting()
    assert {number for number, _ in farm.fabric.ended("alice")} == asked


def _end_one(farm: Farm, rng: random.Random) -> None:
    running = [(name, adapter) for name, list_ in farm.running.items() for adapter, _ in list_]
    if running:
        farm.end(*rng.choice(running))


def _obey_one(farm: Farm, rng: random.Random, code: int = 0) -> None:
    called = [name for name in farm.calls if farm.calls[name]]
    if called:
        farm.obey(rng.choice(called), code, announced_first=rng.random() < 0.5)
