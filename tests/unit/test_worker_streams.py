"""A worker's streams through ends, stops, repeats and reconnects, without a clock."""

from __future__ import annotations

import pytest

from tests.unit.worker_side import WorkerSide, last, token
from zfabric import limits
from zfabric.core.worker.session import Begin, Stop
from zfabric.errors import BackendError, RequestCancelledError, WorkerDrainingError, WorkerLostError
from zfabric.wire import codec
from zfabric.wire.kinds import Kind
from zfabric.wire.load import Load
from zfabric.wire.payloads import Delta
from zfabric.wire.tasks import EmbedRequest

EMBED = codec.encode(EmbedRequest(inputs=["x"]))
SECOND = 10**9


# ── a slot is free when the engine has stopped ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [None, EMBED])
def test_the_word_that_frees_a_slot_waits_for_the_engine(body: bytes | None) -> None:
    side = WorkerSide()
    name = side.begin(1, body=body, operation="embed" if body else "generate")
    assert side.abort(1) == [Stop(name)]
    assert side.heard().ends == []
    assert side.session.busy
    # What the engine still makes is nobody's, and an abort that comes again changes nothing.
    side.emit((name, token()))
    side.session.succeed(name, 5, 0)
    side.session.fail(name, BackendError("late"), 0)
    assert side.abort(1) == []
    side.session.flush()
    assert side.heard().frames == []
    side.session.stopped(name, 0)
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(1, RequestCancelledError.code)]
    assert heard.chunks == []
    side.session.stopped(name, 0)
    assert side.heard().frames == []
    assert not side.session.busy


def test_an_abort_of_what_does_not_run_is_answered_at_once() -> None:
    side = WorkerSide()
    name = side.begin(1)
    side.emit((name, last()))
    side.heard()
    for request in (1, 2):
        assert side.abort(request) == []
        assert [(end.request, end.code) for end in side.heard().ends] == [(request, RequestCancelledError.code)]


def test_what_is_still_stopping_is_carried_and_ends_under_the_next_session() -> None:
    side = WorkerSide()
    first, second, third = side.begin(1), side.begin(2), side.begin(3)
    side.emit((third, token(5)))
    side.abort(1)
    side.abort(2)
    side.emit((third, token(text=None)))  # type: ignore[arg-type]
    side.session.disconnected()
    side.session.stopped(first, 0)
    side.reconnect()
    assert {(line.request, line.finished) for line in side.hello.carried} == {(2, False), (3, False)}
    # Somebody claims one of them: the word comes when its engine has stopped, with what its reader lacks.
    assert side.grant(2, 0, 100, again=True, client=31) == side.grant(3, 0, 100, again=True, client=31) == []
    assert side.heard().frames == []
    side.session.stopped(second, 0)
    side.session.stopped(third, 0)
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(2, RequestCancelledError.code), (3, BackendError.code)]
    assert [chunk.token_ids for chunk in heard.chunks] == [[5]]
    assert first not in side.session.stopping


# ── an attempt runs once ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_attempt_that_comes_twice_runs_once() -> None:
    side = WorkerSide()
    name = side.begin(1)
    assert side.dispatch(1) == []
    side.emit((name, token(1)), (name, last(2)))
    heard = side.heard()
    assert ([c.token_ids for c in heard.chunks], len(heard.ends)) == ([[1, 2]], 1)
    # Once more: its answer is kept, and said again.
    assert side.dispatch(1) == []
    heard = side.heard()
    assert ([c.token_ids for c in heard.chunks], [end.code for end in heard.ends]) == ([[1, 2]], [0])
    assert not side.session.busy
    # While it stops: the word for that answers both.
    other = side.begin(2)
    side.abort(2)
    assert side.dispatch(2) == []
    side.session.stopped(other, 0)
    assert [end.code for end in side.heard().ends] == [RequestCancelledError.code]
    assert not side.session.busy
    # The next attempt is another one.
    assert isinstance(side.dispatch(2, attempt=1)[0], Begin)


def test_dispatches_are_counted_whatever_they_were() -> None:
    side = WorkerSide()
    side.begin(1)
    side.dispatch(1)
    side.dispatch(2, b"")
    side.session.receive(bytes([Kind.DISPATCH]) + codec.encode([1, 2, 3, 4]), b"", 0)
    side.session.outbox.clear()
    side.session.report(0)
    load = codec.unpack_control(side.session.outbox[-1][0])
    assert isinstance(load, Load)
    assert (load.dispatches, load.running) == (4, 1)


# ── lost connections ────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_kept_and_carried_with_its_lock_and_goes_on_for_who_claims_it() -> None:
    side = WorkerSide()
    running, done = side.begin(1, lock=b"a" * 16), side.begin(2, lock=b"b" * 16)
    side.emit((running, token(1)), (done, last(2)))
    side.heard()
    side.session.disconnected()
    side.emit((running, token(2)))
    side.reconnect()
    assert {(line.request, line.lock, line.finished) for line in side.hello.carried} == {
        (1, b"a" * 16, False),
        (2, b"b" * 16, True),
    }
    side.emit((running, token(3)))
    assert side.heard().frames == []
    side.grant(1, 1, 100, again=True, client=31)
    side.grant(2, 0, 100, again=True, client=31)
    heard = side.heard()
    assert [(c.request, c.offset, c.token_ids) for c in heard.chunks] == [(1, 1, [2, 3]), (2, 0, [2])]
    assert [(end.request, end.code) for end in heard.ends] == [(2, 0)]
    assert all(int.from_bytes(h[1:5], "big") == 31 for h, _ in heard.frames if h[0] == Kind.CHUNKS)
    # In the same session again, as when the client alone was lost, also where it has finished since.
    side.emit((running, last(4)))
    side.heard()
    side.grant(1, 2, 100, again=True, client=32)
    heard = side.heard()
    assert [(c.offset, c.token_ids) for c in heard.chunks] == [(2, [3, 4])]
    assert [(end.request, end.code) for end in heard.ends] == [(1, 0)]


def test_a_reader_that_lacks_what_is_gone_begins_again_when_the_engine_has_stopped() -> None:
    side = WorkerSide()
    running, done = side.begin(1), side.begin(2)
    side.emit((running, token(1)), (running, token(2)), (done, token(1)))
    side.grant(1, 2, 100)
    side.emit((done, last(2)))
    side.grant(2, 2, 100)
    side.heard()
    assert side.grant(1, 0, 100, again=True) == [Stop(running)]
    assert side.heard().ends == []
    side.session.stopped(running, 0)
    assert side.grant(2, 0, 100, again=True) == []
    heard = side.heard()
    assert [(end.request, end.code) for end in heard.ends] == [(1, WorkerLostError.code), (2, WorkerLostError.code)]
    assert heard.chunks == []


def test_what_was_sent_before_something_that_cannot_be_is_kept_for_a_reader_that_lacks_it() -> None:
    """And its terminal is the one that it had."""
    side = WorkerSide()
    name = side.begin(1)
    side.emit((name, token(1)), (name, token(2)))
    side.emit((name, token(3, text="\ud800")))
    side.session.stopped(name, 0)
    assert [end.code for end in side.heard().ends] == [BackendError.code]
    side.grant(1, 1, 1_024, again=True)
    heard = side.heard()
    assert [chunk.token_ids for chunk in heard.chunks] == [[2]]
    assert [end.code for end in heard.ends] == [BackendError.code]
    assert heard.outcomes[0].units == 2


@pytest.mark.parametrize("error", [None, BackendError("cuda error")])
def test_a_kept_answer_of_which_a_part_is_gone_ends_with_its_own_error(error: BackendError | None) -> None:
    side = WorkerSide()
    name = side.begin(1)
    side.emit((name, token(1)), (name, token(2)))
    side.grant(1, 2, 1_024)
    if error is None:
        side.emit((name, last(3)))
    else:
        side.session.fail(name, error, 0)
        side.session.flush()
    side.heard()
    side.grant(1, 0, 1_024, again=True)
    assert [end.code for end in side.heard().ends] == [error.code if error is not None else WorkerLostError.code]


@pytest.mark.parametrize("beats", [True, False])
def test_a_finished_answer_is_kept_for_its_time_while_a_controller_is_there(beats: bool) -> None:
    side = WorkerSide(beats=beats)
    name = side.begin(1)
    side.emit((name, last()))
    side.session.disconnected()
    side.session.tick(1_000 * SECOND)
    side.reconnect(1_000 * SECOND)
    assert [line.request for line in side.hello.carried] == [1]
    start_ns = 1_001 * SECOND
    for beat in range(limits.FINISHED_MS // 1_000 + 3):
        side.session.tick(start_ns + beat * SECOND)
    side.session.disconnected()
    side.reconnect(start_ns + 60 * SECOND)
    assert side.hello.carried == []


def test_what_is_kept_is_measured_by_what_it_holds_and_let_go_without_a_rest() -> None:
    side = WorkerSide()
    for number in range(12):
        name = side.begin(number)
        side.emit((name, token(text="x" * 2_000_000)), (name, last(text="y" * 2_000_000)))
        # Acknowledged after its end, it shrinks: what it was entered with is what goes.
        side.grant(number, 1, 1_024)
    kept = side.session._kept
    assert len(kept) == limits.FINISHED_BYTES_MAX // 4_000_000
    for number in range(12):
        side.abort(number)
    assert (len(kept), kept._bytes) == (0, 0)


# ── the window ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_delta_of_more_units_than_the_window_does_not_wait_for_the_end() -> None:
    side = WorkerSide()
    name = side.begin(1, window=4)
    side.emit((name, Delta(text="ten of them", token_ids=list(range(10)))))
    heard = side.heard()
    assert [(c.offset, c.token_ids) for c in heard.chunks] == [(0, [0, 1, 2, 3])]
    text = heard.chunks[0].text
    units = 4
    while units < 10:
        side.grant(1, units, units + 3)
        (chunk,) = side.heard().chunks
        assert chunk.offset == units
        assert len(chunk.token_ids) <= 3
        units += len(chunk.token_ids)
        text += chunk.text
    assert text == "ten of them"
    side.emit((name, last(10)))
    assert [end.code for end in side.heard().ends] == [0]


def test_the_first_chunk_says_whether_it_is_exact() -> None:
    side = WorkerSide()
    exact, other = side.begin(1), side.begin(2)
    side.session.mark_exact(exact)
    side.session.mark_exact("nobody")
    side.emit((exact, token(1)), (other, token(1)))
    side.emit((exact, token(2)), (other, token(2)))
    said = {(c.request, c.offset): c.extra.exact if c.extra else None for c in side.heard().chunks}
    assert said == {(1, 0): True, (2, 0): False, (1, 1): None, (2, 1): None}


def test_a_drain_hands_back_new_requests_and_a_farewell_the_running_ones() -> None:
    side = WorkerSide()
    name = side.begin(1)
    side.emit((name, token(1)))
    side.session.drain(0)
    side.heard()
    assert side.dispatch(2) == []
    (order,) = side.dispatch(3, codec.encode(["list"]), operation="operate")
    assert isinstance(order, Begin)
    assert [(end.request, end.code) for end in side.heard().ends] == [(2, WorkerDrainingError.code)]
    side.session.goodbye("drained")
    assert {(end.request, end.code) for end in side.heard().ends} == {
        (1, WorkerDrainingError.code),
        (3, WorkerDrainingError.code),
    }
