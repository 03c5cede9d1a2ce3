"""Deliberate faults in the tables and state machines: what is counted, queued, routed, timed and recovered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.deliberate import fault, wrap
from zfabric.core import timers
from zfabric.core.client import requests as client_requests
from zfabric.core.client import session as client_session
from zfabric.core.controller import broker as broker_module
from zfabric.core.controller import (
    circuits,
    endings,
    fair_queue,
    grants,
    peers,
    queues,
    recovery,
    routes,
    scheduler,
    sessions,
)
from zfabric.core.controller.request_state import RequestState
from zfabric.core.worker import backlog
from zfabric.core.worker import session as worker_session
from zfabric.core.worker import streams as worker_streams
from zfabric.wire.flow import CreditLine

_LOST = "could go on|everybody was there"


@fault("ended 0 times|beyond its deadline", "worker killed", "worker link cut")
def a_lost_retry(patch: pytest.MonkeyPatch) -> None:
    """The next attempt is counted, and never sent."""
    patch.setattr(client_session.ClientSession, "_submit_or_end", lambda self, pending, now_ns: None)


@fault(_LOST, "worker killed")
def no_retry_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_requests, "why_final", lambda pending, error, now_ns: error)


@fault("ended 2 times", quiet=True)
def a_doubled_terminal(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def end(self: Any, pending: Any, error: Any, outcome: Any) -> None:
            known = pending.number in self.requests
            original(self, pending, error, outcome)
            if known and error is not None:
                pending.sink.ended(error, outcome)

        return end

    wrap(patch, client_session.ClientSession, "_end", make)


@fault("ended 0 times|at rest|beyond its deadline")
def a_lost_terminal(patch: pytest.MonkeyPatch) -> None:
    """Cancelled requests that wait get none."""
    patch.setattr(endings.Endings, "_end_waiting", lambda self, request, before, error: self._unqueue(request, before))


@fault("with credit for", quiet=True, fault_ms=3_000)
def an_off_by_one_in_credit(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def take(self: Any, columns: Any, worker: str) -> Any:
            self.window += 1
            try:
                return original(self, columns, worker)
            finally:
                self.window -= 1

        return take

    wrap(patch, backlog.Backlog, "take", make)


@fault("repeats", "client link cut", "controller killed")
def a_replay_from_one_too_early(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def rewind(self: Any, units: int) -> Any:
            return original(self, max(0, units - 1))

        return rewind

    wrap(patch, backlog.Backlog, "rewind", make)


@fault("ended 0 times|beyond its deadline|gaps", "client link cut", "controller killed")
def a_recovered_stream_is_not_told_to_go_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grants, "CreditLine", lambda *, again, **values: CreditLine(**values))


@fault("keeps .* at rest")
def a_slot_that_leaks(patch: pytest.MonkeyPatch) -> None:
    """An aborted request keeps its place for ever."""

    def make(original: Any) -> Any:
        def ended(self: Any, request: Any, *rest: Any) -> None:
            if request.state is not RequestState.ORPHANED:
                original(self, request, *rest)

        return ended

    wrap(patch, endings.Endings, "_ended", make)


@fault(r"runs \d+ requests with \d+ slots", quiet=True)
def a_slot_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(peers.WorkerPeer, "free", property(lambda self: self.load.slots - self.in_flight + 1))


@fault(r"runs \d+ requests with \d+ slots", fault_ms=3_000)
def a_slot_that_is_free_before_its_engine_has_stopped(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def stop(self: Any, stream: Any, error: Any) -> None:
            original(self, stream, error)
            self._tell(stream.instance, stream.request, stream.attempt, error)

        return stop

    wrap(patch, worker_streams.WorkerStreams, "_stop", make)


@fault(r"runs \d+ requests with \d+ slots", "worker link cut", "client killed", first=310)
def what_is_brought_back_in_vain_holds_no_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "SLOTS_MAX", 0)


@fault("dead for longer than its lease", "worker killed")
def a_lease_that_never_lapses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sessions.Sessions, "_lease", lambda self, worker, now_ns: None)
    wrap(patch, broker_module.Broker, "disconnected", lambda original: lambda self, peer, now_ns: None)


@fault("its messages waited to be read", "controller paused")
def a_lease_that_lapses_unheard(patch: pytest.MonkeyPatch) -> None:
    """A controller that was stopped judges before it reads."""
    patch.setattr(timers.Timers, "judge_at", timers.Timers.at)


@fault("beyond its deadline")
def a_deadline_that_never_comes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(endings.Endings, "deadline", lambda self, request: None)
    patch.setattr(client_session.ClientSession, "_guard", lambda self, pending: None)


@fault("route", quiet=True)
def a_route_that_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routes.Routes, "drop", lambda self, worker, client: None)


@fault("ended 0 times|beyond its deadline|are said to wait|ValueError|KeyError", quiet=True)
def a_queue_that_loses_one(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def push(self: Any, item: Any) -> None:
            if item.request % 5:
                original(self, item)

        return push

    wrap(patch, fair_queue.FairQueue, "push", make)


@fault("could take it", quiet=True)
def nobody_fills_a_free_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler.Scheduler, "fill", lambda self, worker, now_ns: None)


@fault("could take it", quiet=True)
def what_nobody_can_take_now_blocks_what_somebody_could(patch: pytest.MonkeyPatch) -> None:
    """A worker looks at the head of a model's queue alone."""

    def make(original: Any) -> Any:
        def next_for(self: Any, worker: Any) -> Any:
            found = original(self, worker)
            if found is None:
                return None
            queue = found[1].model.queue
            first = min((queue.oldest(demand) for demand in queue.demands), key=lambda head: head.rank)
            return found if first.item.demand in found[1].demands else None

        return next_for

    wrap(patch, queues.Queues, "_next_for", make)


@fault("ended 0 times|beyond its deadline|missed a deadline", "worker announces", "worker killed")
def what_nobody_can_do_any_more_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queues.Queues, "_review", lambda self, model, demand, supply: None)


@fault("with a hung engine", "engine hung")
def a_stall_that_nobody_sees(patch: pytest.MonkeyPatch) -> None:
    """An engine hangs, its process beats on, and its requests stay with it."""
    patch.setattr(endings.Endings, "engine_stalled", lambda self, worker, engine, silent_ms: None)


@fault(_LOST, "controller killed", "client link cut")
def finished_answers_are_not_kept(patch: pytest.MonkeyPatch) -> None:
    """What ended while there was no controller is forgotten, and started again from nothing."""
    patch.setattr(worker_session.WorkerSession, "_keep", lambda self, stream: None)
    patch.setattr(client_requests, "why_final", lambda pending, error, now_ns: error)


@fault(".")
def timers_that_are_cancelled_fire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(timers.Timers, "cancel", lambda self, timer: None)


@fault("a controller that drains refused its next attempt", "controller drains", "worker killed")
def a_controller_that_drains_takes_nothing_back(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        scheduler.Scheduler,
        "_admit",
        lambda original: (
            lambda self, client, envelope, size, place, now_ns: original(self, client, envelope, size, None, now_ns)
        ),
    )


@fault("everybody was there", "client link cut")
def a_lost_connection_is_a_farewell(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sessions.Sessions, "client_lost", sessions.Sessions.client_left)


@fault("everybody was there", "worker link cut")
def nobody_waits_for_a_worker_that_was_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_requests, "may_return", lambda error: False)


@fault("and the controller knows", "worker announces")
def models_that_change_behind_a_hello(patch: pytest.MonkeyPatch) -> None:
    """The answer to a HELLO is taken for the answer to what is served by then."""

    def make(original: Any) -> Any:
        def welcome(self: Any, message: Any, now_ns: int) -> Any:
            self._announced = self.models
            return original(self, message, now_ns)

        return welcome

    wrap(patch, worker_session.WorkerSession, "_welcome", make)


@fault("did not come back|knows", "worker frozen", "controller paused", "worker announces")
def a_welcome_that_is_not_taken(patch: pytest.MonkeyPatch) -> None:
    """A worker forgets that it has said HELLO when it hears that its former words were no use."""

    def make(original: Any) -> Any:
        def start_over(self: Any, now_ns: int, delay_ms: float) -> None:
            self._asked = False
            original(self, now_ns, delay_ms)

        return start_over

    wrap(patch, worker_session.WorkerSession, "_start_over", make)


@fault("are out")
def all_hosts_are_out_at_once(patch: pytest.MonkeyPatch) -> None:
    """Circuits open however many are open already."""
    patch.setattr(circuits.Circuits, "_may_be_out", lambda self, host: True)
    patch.setattr(circuits.Circuits, "fit", lambda self, model: None)


@fault("could take it")
def a_circuit_that_closes_and_tells_nobody(patch: pytest.MonkeyPatch) -> None:
    """What waits is not given to a worker whose time out is over."""

    def half_open(self: Any, host: Any, circuit: Any) -> None:
        circuit.timer = None

    patch.setattr(circuits.Circuits, "_half_open", half_open)
