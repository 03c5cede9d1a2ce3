"""Deliberate faults at the edges: what one party hands over, and the next one cannot frame, size, encode, decode or suit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.simulation.deliberate import fault, wrap
from zfabric import errors
from zfabric.core.client import inquiries
from zfabric.core.client import requests as client_requests
from zfabric.core.client import session as client_session
from zfabric.core.controller import dispatch, endings, names, peers, queries, recovery, routes, scheduler, sessions
from zfabric.core.worker import backlog, packing
from zfabric.core.worker import session as worker_session
from zfabric.core.worker import streams as worker_streams
from zfabric.testing import network
from zfabric.wire import codec
from zfabric.worker import reports, runs, served, service

# ── framing and size ────────────────────────────────────────────────────────────────────────────────────────────────


@fault(".", quiet=True)
def frames_by_the_bodys_truth(patch: pytest.MonkeyPatch) -> None:
    """An empty body is no frame, so the next message's first frame is taken for it."""
    patch.setattr(network, "frames_of", lambda header, body: [header, body] if body else [header])


@fault("its receiver takes", quiet=True)
def one_message_whatever_its_size(patch: pytest.MonkeyPatch) -> None:
    def add(self: Any, streams: Any, chunks: Any, finished: Any) -> None:
        self.messages.append(packing.pack_whole(self._client, chunks, finished or None))

    patch.setattr(packing.Packing, "add", add)


@fault("its receiver takes", quiet=True)
def one_answer_whatever_its_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queries, "_parts", lambda result: [codec.raw(result)])


# ── what does not encode or decode ──────────────────────────────────────────────────────────────────────────────────


@fault("UnicodeEncodeError|OverflowError|could not be sent", quiet=True)
def a_request_that_is_encoded_when_it_is_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_requests, "encoded", lambda request, limit: codec.encode(request))


@fault("UnicodeEncodeError|TypeError|could not be answered", quiet=True)
def a_delta_that_is_encoded_with_its_neighbours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker_streams, "ENCODING_ERRORS", ())


@fault("and could not be answered|broken answers", quiet=True, first=100)
def a_result_that_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """It can be encoded, and is not what its caller can read."""
    patch.setattr(runs, "_checked", lambda request, result: result)


@fault("cannot be announced|TypeError", quiet=True)
def a_gauge_that_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reports, "_sound", lambda report: (report, ""))


@fault("multiple values|TypeError", quiet=True)
def details_as_keyword_arguments(patch: pytest.MonkeyPatch) -> None:
    def from_wire(code: int, message: str, details: Any) -> errors.FabricError:
        return errors.BY_CODE.get(code, errors.FabricError)(message, **details)

    patch.setattr(client_requests, "from_wire", from_wire)


@fault("keeps requests at rest", quiet=True)
def a_question_without_an_answer(patch: pytest.MonkeyPatch) -> None:
    """What cannot be answered is not, and nobody's patience ends."""

    def make(original: Any) -> Any:
        def answer(broker: Any, client: Any, query: Any) -> None:
            if query.number % 3:
                original(broker, client, query)

        return answer

    wrap(patch, queries, "answer", make)
    wrap(patch, inquiries.Inquiries, "add", _patient)


def _patient(original: Any) -> Any:
    def add(self: Any, what: str, arguments: Any, inquirer: Any, now_ns: int, timeout_ms: int) -> Any:
        return original(self, what, arguments, inquirer, now_ns, 10**9)

    return add


# ── who can serve what ──────────────────────────────────────────────────────────────────────────────────────────────


@fault("is said to be unknown|is refused for", "worker announces", "worker killed", first=590)
def a_name_that_belongs_to_its_first_holder(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def put(self: Any, name: str, model: Any, *, held: bool, order: int = 0) -> None:
            original(self, name, model, held=True, order=-order or 1)

        return put

    wrap(patch, names.Names, "put", make)
    patch.setattr(names.Names, "discard", lambda self, name, model: None)


@fault("asks for .* and went to", quiet=True)
def a_call_that_loses_its_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(served.ServedModels, "for_call", lambda self, model: self._backends[0])


@fault("ZeroDivisionError|AssertionError", quiet=True)
def a_policy_that_is_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch.Chooser, "choose", lambda self, ask, now_ns: self._policy(ask))


@fault("with a hung engine", "engine hung", first=960)
def an_engine_that_hides_behind_another(patch: pytest.MonkeyPatch) -> None:
    """Progress is told of the worker as a whole."""

    def make(original: Any) -> Any:
        def refresh(self: Any, load: Any, units: int, now_ns: int) -> None:
            original(self, load, units, now_ns)
            load.engines = [load.progress] * len(load.engines)

        return refresh

    wrap(patch, reports.LoadReports, "refresh", make)


@fault("and it takes requests for|and the controller knows", "worker announces")
def a_collision_that_costs_what_was_served(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def serve(self: Any, backend: Any, infos: Any) -> None:
            try:
                original(self, backend, infos)
            except errors.ConfigurationError:
                original(self, backend, [])
                raise

        return serve

    wrap(patch, service.WorkerService, "_serve", make)


@fault("and the controller knows", "worker announces")
def nothing_is_not_announced(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def hello(self: Any, now_ns: int) -> None:
            if self.models or not self.registered:
                original(self, now_ns)

        return hello

    wrap(patch, worker_session.WorkerSession, "_hello", make)


# ── twice, late, or in the wrong moment ─────────────────────────────────────────────────────────────────────────────


@fault("before its drain's limit", "worker drained")
def a_drain_that_is_asked_twice(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        async def drain(self: Any, limit_ms: int | None = None) -> None:
            if self._draining is not None:
                self._stopping.set()
            await original(self, limit_ms)

        return drain

    wrap(patch, service.WorkerService, "drain", make)


@fault("in _runs at rest", quiet=True)
def what_is_cancelled_before_it_began(patch: pytest.MonkeyPatch) -> None:
    """The entry of a task is taken away by the task, which may never begin."""

    def make(original: Any) -> Any:
        def ended(self: Any, request_id: str, task: Any) -> None:
            run = self._runs[request_id]
            original(self, request_id, task)
            if task.cancelled():
                self._runs[request_id] = run

        return ended

    wrap(patch, runs.Runs, "_ended", make)


@fault("with credit for more", quiet=True)
def a_delta_beyond_the_window_waits_for_the_end(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def take(self: Any, columns: Any, worker: str) -> Any:
            kept = self.deltas[self.sent] if self.sent < len(self.deltas) else None
            if kept is None or self.finished or self.next + backlog.units_of(kept) <= self.window:
                original(self, columns, worker)

        return take

    wrap(patch, backlog.Backlog, "take", make)


@fault("ended 0 times|has no answer", quiet=True)
def a_refusal_that_stops_the_clock(patch: pytest.MonkeyPatch) -> None:
    """Who is refused for now waits without end."""
    from zfabric.client.connection import Connection

    def make(original: Any) -> Any:
        def wait(self: Any) -> None:
            if self.session.refused is None:
                original(self)

        return wait

    wrap(patch, Connection, "_wait_for_controller", make)
    wrap(patch, Connection, "_give_up", lambda original: lambda self: None)


# ── who is believed ─────────────────────────────────────────────────────────────────────────────────────────────────


@fault("requests for .* wait for|bytes wait, limit is", quiet=True, fault_ms=3_000)
def an_attempt_that_is_believed(patch: pytest.MonkeyPatch) -> None:
    """Whoever says that it has waited before may wait where no further request may."""

    def make(original: Any) -> Any:
        def check(self: Any, model: Any, envelope: Any, size: int, place: Any) -> None:
            if not envelope.attempt:
                original(self, model, envelope, size, place)

        return check

    wrap(patch, scheduler.Scheduler, "_check_room", make)


@fault(".", "controller killed", "controller leaves")
def a_claim_without_a_lock(patch: pytest.MonkeyPatch) -> None:
    for module in (peers, sessions):
        patch.setattr(module, "lock_of", lambda secret: b"")
    wrap(patch, recovery.Recovery, "_enter", _unlocked)


def _unlocked(original: Any) -> Any:
    def enter(self: Any, worker: Any, line: Any) -> Any:
        line.lock = b""
        return original(self, worker, line)

    return enter


@fault(
    "speaks under its client's number|ended 0 times|beyond its deadline",
    "controller killed",
    "client link cut",
    first=280,
)
def a_number_that_keeps_its_client_out(patch: pytest.MonkeyPatch) -> None:
    def stay(self: Any, now_ns: int) -> None:
        self._start_over(now_ns, 1_000)

    patch.setattr(client_session.ClientSession, "_take_another_number", stay)


@fault("got the tokens|got 'evil'|instead of|saw .* gaps", quiet=True)
def a_chunk_of_whoever_knows_a_number(patch: pytest.MonkeyPatch) -> None:
    """A route by the reader alone: outsiders write into others' answers, by numbers that they overheard."""

    class OfAnybody(dict[bytes, Any]):
        def get(self, key: bytes, default: Any = None) -> Any:
            return next((route for known, route in self.items() if known[-5:] == key[-5:]), default)

    def make(original: Any) -> Any:
        def begin(self: Any) -> None:
            original(self)
            self.table = OfAnybody()

        return begin

    wrap(patch, routes.Routes, "__init__", make)


@fault("ended with|ended well|is well|could go on|keeps", quiet=True)
def a_terminal_of_whoever_knows_a_number(patch: pytest.MonkeyPatch) -> None:
    """An outsider's terminal ends what runs elsewhere."""

    def make(original: Any) -> Any:
        def ends(self: Any, worker: Any, envelope: Any, *rest: Any) -> None:
            for end in envelope.ends:
                request = self._registry.live.get((envelope.instance, end.request, end.attempt))
                if request is not None and request.worker is not worker:
                    self.give_up(request, errors.BackendError("another worker says so"))
            original(self, worker, envelope, *rest)

        return ends

    wrap(patch, endings.Endings, "ends", make)


# ── promises ────────────────────────────────────────────────────────────────────────────────────────────────────────


@fault("could go on|drawn in", "worker killed")
def an_answer_with_the_defaults_ends_with_its_worker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(worker_session.WorkerSession, "mark_exact", lambda self, request_id: None)


@fault("drawn in", "worker killed", first=180)
def a_seed_that_is_drawn_anew(patch: pytest.MonkeyPatch) -> None:
    """The client goes on elsewhere, and the next worker draws as it likes."""

    def make(original: Any) -> Any:
        def submit(self: Any, pending: Any, now_ns: int) -> None:
            pending.drawn_seed = None if pending.drawn_seed is None else pending.drawn_seed ^ pending.attempt
            original(self, pending, now_ns)

        return submit

    wrap(patch, client_requests.ClientRequests, "_submit", make)
