"""Clusters under faults: fresh seeds each time, every seed that ever failed, and proof that the checkers bite."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from zfabric.testing.actors import SimWorker

from zfabric.core import (
    backlog,
    client_session,
    desk,
    endings,
    queueing,
    recovery,
    registry,
    routes,
    sessions,
    timers,
    worker_session,
)
from zfabric.core import broker as broker_module
from zfabric.core.request_state import RequestState
from zfabric.testing import Violation, simulate
from zfabric.wire.messages import CreditLine

#: What each of these found is in the history of the code that it changed.
REGRESSIONS = (
    1448,
    1584,
    1871,
    2089,
    2261,
    2546,
    2879,
    3019,
    3217,
    3255,
    3458,
    4027,
    90477,
    93385,
    500408,
    502170,
    502886,
)
FRESH = 300


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_once_failed(seed: int) -> None:
    simulate(seed)


def test_fresh_seeds() -> None:
    first = random.SystemRandom().randrange(2**40)
    reports = [simulate(seed) for seed in range(first, first + FRESH)]
    assert sum(report.outcomes["done"] for report in reports) > FRESH
    assert sum(report.failovers for report in reports) > FRESH / 10
    assert sum(report.recovered for report in reports) > 0


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(10):
        assert simulate(seed) == simulate(seed)


Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Patch] = {}


def fault(function: Patch) -> Patch:
    FAULTS[function.__name__] = function
    return function


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, make(getattr(owner, name)))


@fault
def a_lost_retry(patch: pytest.MonkeyPatch) -> None:
    """The next attempt is counted, and never sent."""
    patch.setattr(client_session.ClientSession, "_submit_or_end", lambda self, pending, now_ns: None)


@fault
def no_retry_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_session.ClientSession, "_why_final", lambda self, pending, error, now_ns: error)


@fault
def a_doubled_terminal(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def end(self: Any, pending: Any, error: Any, outcome: Any) -> None:
            known = pending.number in self.requests
            original(self, pending, error, outcome)
            if known and error is not None:
                pending.sink.ended(error, outcome)

        return end

    wrap(patch, client_session.ClientSession, "_end", make)


@fault
def a_lost_terminal(patch: pytest.MonkeyPatch) -> None:
    """Cancelled requests that wait get none."""
    patch.setattr(endings.Endings, "_end_waiting", lambda self, request, before, error: self._unqueue(request, before))


@fault
def an_off_by_one_in_credit(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def take(self: Any, worker: str) -> Any:
            self.window += 1
            try:
                return original(self, worker)
            finally:
                self.window -= 1

        return take

    wrap(patch, backlog.Backlog, "take", make)


@fault
def a_replay_from_one_too_early(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def rewind(self: Any, units: int) -> Any:
            return original(self, max(0, units - 1))

        return rewind

    wrap(patch, backlog.Backlog, "rewind", make)


@fault
def a_recovered_stream_is_not_told_to_go_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "CreditLine", lambda *, again, **values: CreditLine(**values))


@fault
def a_slot_that_leaks(patch: pytest.MonkeyPatch) -> None:
    """An aborted request keeps its place for ever."""

    def make(original: Any) -> Any:
        def ends(self: Any, worker: Any, envelope: Any, header: bytes, body: bytes, now_ns: int) -> None:
            envelope.ends = [
                end
                for end in envelope.ends
                if (request := worker.live.get((envelope.instance, end.request, end.attempt))) is None
                or request.state is not RequestState.ORPHANED
            ]
            original(self, worker, envelope, header, body, now_ns)

        return ends

    wrap(patch, endings.Endings, "ends", make)


@fault
def a_slot_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(registry.WorkerPeer, "free", property(lambda self: self.load.slots - self.in_flight + 1))


@fault
def a_lease_that_never_lapses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sessions.Sessions, "_lease", lambda self, worker, now_ns: None)
    wrap(patch, broker_module.Broker, "disconnected", lambda original: lambda self, peer, now_ns: None)


@fault
def a_deadline_that_never_comes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(endings.Endings, "deadline", lambda self, request: None)
    patch.setattr(client_session.ClientSession, "_guard", lambda self, pending: None)


@fault
def a_route_that_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routes.Routes, "drop", lambda self, worker, client: None)


@fault
def a_queue_that_loses_one(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def push(self: Any, item: Any) -> None:
            if item.request % 5:
                original(self, item)

        return push

    wrap(patch, queueing.FairQueue, "push", make)


@fault
def nobody_fills_a_free_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(desk.RequestDesk, "fill", lambda self, worker, now_ns: None)


@fault
def a_stall_that_nobody_sees(patch: pytest.MonkeyPatch) -> None:
    """An engine hangs for ever, its process beats on, and its requests stay with it."""
    patch.setattr(endings.Endings, "engine_stalled", lambda self, worker, engine, silent_ms: None)

    def hang(self: SimWorker, life: object) -> None:
        self.engine_hangs = self.name == "w0"
        step_of(self, life)

    step_of = SimWorker._schedule_step
    patch.setattr(SimWorker, "_schedule_step", hang)


@fault
def finished_answers_are_not_kept(patch: pytest.MonkeyPatch) -> None:
    """What ended while there was no controller is forgotten, and started again from nothing."""
    patch.setattr(worker_session.WorkerSession, "_keep", lambda self, stream: None)
    patch.setattr(client_session.ClientSession, "_why_final", lambda self, pending, error, now_ns: error)


@fault
def timers_that_are_cancelled_fire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(timers.Timers, "cancel", lambda self, timer: None)


@pytest.mark.parametrize("name", FAULTS)
def test_the_checkers_bite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each deliberate fault in the core is caught within a few hundred clusters."""
    FAULTS[name](monkeypatch)
    with pytest.raises(Violation, match="seed="):
        _simulate_all(range(400))


def _simulate_all(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)
