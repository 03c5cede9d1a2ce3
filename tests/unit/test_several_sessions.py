"""A worker with several controllers: slots are shared, nothing runs twice, and a request follows its reader."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zfabric.core.worker.orders import name_of
from zfabric.core.worker.session import Begin, WorkerSession
from zfabric.core.worker.sessions import WorkerSessions
from zfabric.errors import ProtocolError, RequestCancelledError, WorkerDrainingError
from zfabric.ids import milliseconds
from zfabric.limits import FRAME_BYTES_MAX, SHARE_TELL_MS, WANTING_MS
from zfabric.wire import codec, kinds
from zfabric.wire.flow import Abort, CreditLine, Grant
from zfabric.wire.load import Load
from zfabric.wire.messages import Beat, Dispatch, End, Locate, Located, ModelInfo, Welcome
from zfabric.wire.payloads import Delta, GenerateRequest, OperateRequest

INSTANCE = 9
_SECOND = milliseconds(1_000)


class Worker:
    """A worker that is registered at some controllers, and what it has told each."""

    def __init__(self, controllers: int, slots: int, *, minor: int = kinds.MINOR_VERSION) -> None:
        self.now_ns = _SECOND
        self.minor = minor
        self.sessions = WorkerSessions(name="w", instance=1, rng=random.Random(1))
        self.sessions.load.slots = slots
        self.sessions.announce([ModelInfo(name="m")], 0)
        self.each = [self.sessions.open() for _ in range(controllers)]
        self.loads: list[list[Load]] = [[] for _ in self.each]
        self.ends: list[list[tuple[End, Any]]] = [[] for _ in self.each]
        self.located: list[list[Located]] = [[] for _ in self.each]
        self.text: list[str] = ["" for _ in self.each]
        for number in range(controllers):
            self.welcome(number)

    def welcome(self, number: int) -> None:
        session = self.each[number]
        session.connected(self.now_ns)
        self.now_ns += _SECOND
        session.tick(self.now_ns)
        message = Welcome(
            version=kinds.PROTOCOL_VERSION, build="", epoch=number + 1, session=1, token=b"t", beat_ms=600_000,
            lease_ms=1_800_000, frame_bytes_max=FRAME_BYTES_MAX, minor=self.minor,
        )  # fmt: skip
        session.receive(*codec.pack(message), self.now_ns)
        session.outbox.clear()

    def dispatch(self, number: int, request: int, **fields: Any) -> str | None:
        """A controller sends a request. Returns its name if it begins."""
        known = {
            "client": 7, "instance": INSTANCE, "request": request, "attempt": 0, "operation": "generate", "model": "m",
            "window": 1_024,
        }  # fmt: skip
        envelope = codec.pack_envelope(Dispatch(**{**known, **fields}))
        orders = self.each[number].receive(envelope, codec.encode(GenerateRequest(prompt="x")), self.now_ns)
        self.read()
        begun = [order.request_id for order in orders if isinstance(order, Begin)]
        return begun[0] if begun else None

    def say(self, number: int, message: Any) -> None:
        self.each[number].receive(*codec.pack(message), self.now_ns)
        self.read()

    def emit(self, request: int, text: str, *, last: bool = False) -> None:
        delta = Delta(text=text, token_ids=[1], finish_reason="stop" if last else None)
        self.sessions.emit([(name_of(INSTANCE, request, 0), delta)], self.now_ns)
        self.read()

    def take_over(self, number: int, request: int, *, client: int = 8, units: int = 0) -> None:
        """A controller has matched a claim."""
        line = CreditLine(request=request, attempt=0, next=units, window=1_024, again=True)
        self.say(number, Grant(client=client, instance=INSTANCE, lines=[line]))

    def read(self) -> None:
        """Sort what was said, in order."""
        self.sessions.flush(self.now_ns)
        for number, session in enumerate(self.each):
            outbox, session.outbox = session.outbox, []
            for header, body in outbox:
                if header[0] == kinds.LOAD:
                    self.loads[number].append(codec.unpack_control(header))
                elif header[0] == kinds.LOCATED:
                    self.located[number].append(codec.unpack_control(header))
                elif header[0] == kinds.CHUNKS:
                    self.text[number] += "".join(chunk.text for chunk in codec.unpack_chunks(header).rows())
                elif header[0] == kinds.ENDS:
                    content = codec.unpack_ends_body(body)
                    self.text[number] += "".join(chunk.text for chunk in content.chunks.rows())
                    ends = codec.unpack_envelope(header).ends
                    self.ends[number] += zip(ends, content.outcomes, strict=True)

    def free(self, number: int) -> int:
        """Slots that a controller may fill, as it was told last: what it has sent itself it knows."""
        load = self.loads[number][-1] if self.loads[number] else self.sessions.load
        return load.slots - load.elsewhere - self.each[number].held

    def later(self, ms: float = SHARE_TELL_MS) -> None:
        self.now_ns += milliseconds(ms)
        self.sessions.tick(self.now_ns)
        self.read()


def test_each_controller_knows_what_the_others_use() -> None:
    worker = Worker(2, slots=4)
    for request in range(3):
        assert worker.dispatch(0, request)
        worker.later()
    assert worker.free(0) == worker.free(1) == 1
    worker.emit(0, "a", last=True)
    worker.later()
    assert worker.free(0) == worker.free(1) == 2


def test_a_controller_of_an_earlier_version_is_told_of_fewer_slots() -> None:
    worker = Worker(2, slots=4, minor=3)
    worker.dispatch(0, 1)
    worker.later()
    assert (worker.loads[1][-1].slots, worker.loads[1][-1].elsewhere) == (3, 0)


def test_changes_are_told_together_unless_somebody_has_no_slot() -> None:
    worker = Worker(2, slots=8)
    worker.later(1_000)
    before = len(worker.loads[1])
    for request in range(7):
        worker.dispatch(0, request)
    # The first at once, the others of these 10 ms together.
    assert len(worker.loads[1]) == before + 1
    worker.later()
    assert len(worker.loads[1]) == before + 2
    assert worker.free(1) == 1
    worker.dispatch(1, 7)
    worker.emit(0, "a", last=True)
    assert worker.free(1) == 1


def test_the_later_of_two_that_want_the_last_slot_gets_it_back() -> None:
    worker = Worker(2, slots=1)
    assert worker.dispatch(0, 1)
    assert worker.dispatch(1, 2) is None
    ((end, outcome),) = worker.ends[1]
    assert (end.request, end.code) == (2, WorkerDrainingError.code)
    assert outcome.details["busy"] is True
    # It knows of the other's request before it hears of its own.
    assert worker.loads[1][0].elsewhere == 1


def test_an_operator_s_call_needs_no_slot() -> None:
    worker = Worker(2, slots=1)
    assert worker.dispatch(0, 1)
    envelope = Dispatch(client=7, instance=INSTANCE, request=2, attempt=0, operation="operate", model="", window=1)
    orders = worker.each[1].receive(
        codec.pack_envelope(envelope), codec.encode(OperateRequest(call="show")), worker.now_ns
    )
    assert any(isinstance(order, Begin) for order in orders)
    worker.later()
    assert worker.free(0) == 0


def test_an_attempt_runs_once_whoever_sends_it() -> None:
    worker = Worker(2, slots=4)
    assert worker.dispatch(0, 1)
    assert worker.dispatch(1, 1) is None
    assert worker.ends[1][0][0].code == ProtocolError.code
    assert worker.sessions.count == 1


def test_where_several_controllers_have_clients_waiting_they_share_by_their_number() -> None:
    worker = Worker(2, slots=8)
    for request in range(8):
        worker.dispatch(0, request)
    worker.say(0, Beat(1, wanting=1))
    worker.say(1, Beat(1, wanting=3))
    for request in range(8):
        worker.emit(request, "a", last=True)
        worker.later()
        if request < 5:
            assert worker.free(1) == request + 1
    assert (worker.free(0), worker.free(1)) == (2, 6)


def test_one_slot_goes_around() -> None:
    """Whoever has had it does not have it again while another waits."""
    worker = Worker(3, slots=1)
    turns: list[int] = []
    for number in range(3):
        worker.say(number, Beat(1, wanting=1))
    worker.later()
    for request in range(9):
        (ready,) = [number for number in range(3) if worker.free(number) > 0]
        assert worker.dispatch(ready, request)
        turns.append(ready)
        worker.emit(request, "a", last=True)
        worker.later()
    assert {turns.count(number) for number in range(3)} == {3}


def test_nothing_is_kept_for_a_controller_that_says_nothing_any_more() -> None:
    worker = Worker(2, slots=2)
    worker.say(0, Beat(1, wanting=1))
    worker.say(1, Beat(1, wanting=1))
    worker.later()
    assert worker.free(0) == 1
    worker.later(WANTING_MS)
    assert worker.free(0) == worker.free(1) == 2
    worker.say(0, Beat(1, wanting=1))
    worker.say(1, Beat(1, wanting=1))
    worker.each[1].disconnected()
    worker.later()
    assert worker.free(0) == 2


def test_a_request_follows_its_reader() -> None:
    worker = Worker(2, slots=4)
    worker.dispatch(0, 1, lock=b"k")
    worker.emit(1, "a ")
    worker.emit(1, "b ")
    worker.say(1, Locate(number=5, instance=INSTANCE, attempts=[(1, 0), (2, 0)]))
    (located,) = worker.located[1]
    assert (located.number, located.more) == (5, False)
    assert [(line.request, line.attempt, line.lock) for line in located.carried] == [(1, 0, b"k")]
    worker.take_over(1, 1, units=1)
    assert (worker.text[0], worker.text[1]) == ("a b ", "b ")
    # To the former controller it has ended.
    assert [(end.request, end.code) for end, _ in worker.ends[0]] == [(1, RequestCancelledError.code)]
    worker.say(0, Abort(instance=INSTANCE, attempts=[(1, 0)]))
    worker.emit(1, "c ", last=True)
    assert worker.text[1] == "b c "
    assert worker.ends[1][0][0].code == 0


def test_a_finished_answer_follows_its_reader() -> None:
    worker = Worker(2, slots=4)
    worker.dispatch(0, 1)
    worker.each[0].disconnected()
    worker.emit(1, "a ")
    worker.emit(1, "b ", last=True)
    assert worker.text == ["", ""]
    worker.take_over(1, 1)
    assert worker.text[1] == "a b "
    assert worker.ends[1][0][0].units == 2
    # It is told to whom it belongs now, and to nobody else.
    worker.welcome(0)
    assert worker.each[0].carried() == []
    assert len(worker.each[1].carried()) == 1


def test_what_is_to_stop_is_not_to_be_read() -> None:
    worker = Worker(2, slots=4)
    name = worker.dispatch(0, 1)
    assert name is not None
    worker.say(0, Abort(instance=INSTANCE, attempts=[(1, 0)]))
    worker.say(1, Locate(number=5, instance=INSTANCE, attempts=[(1, 0)]))
    assert worker.located[1][0].carried == []
    worker.sessions.stopped(name, worker.now_ns)
    worker.read()
    assert worker.ends[0][0][0].code == RequestCancelledError.code


def test_a_closed_session_is_forgotten_when_nothing_of_it_is_left() -> None:
    worker = Worker(2, slots=4)
    worker.dispatch(0, 1)
    worker.sessions.close(worker.each[0])
    assert len(list(worker.sessions)) == 2
    worker.take_over(1, 1)
    worker.sessions.tick(worker.now_ns)
    assert list(worker.sessions) == [worker.each[1]]
    worker.emit(1, "a ", last=True)
    assert worker.text[1] == "a "


class Sharing(RuleBasedStateMachine):
    """Three controllers that send as much as they may, as far as they know, and hear of it at any time."""

    @initialize(slots=st.integers(1, 6))
    def start(self, slots: int) -> None:
        self.worker = Worker(3, slots)
        self.slots = slots
        self.next = 0
        self.running: dict[int, int] = {}

    @rule(number=st.integers(0, 2), wanting=st.integers(0, 4))
    def wants(self, number: int, wanting: int) -> None:
        self.worker.say(number, Beat(1, wanting=wanting))

    @rule(number=st.integers(0, 2))
    def sends(self, number: int) -> None:
        if self.worker.free(number) > 0:
            self.next += 1
            before = self.worker.sessions.held
            begun = self.worker.dispatch(number, self.next)
            # Handed back where all slots are taken, and only there.
            assert (begun is not None) is (before < self.slots)
            if begun is not None:
                self.running[self.next] = number

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[request]
        self.worker.emit(request, "a", last=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), number=st.integers(0, 2))
    def moves(self, data: st.DataObject, number: int) -> None:
        request = data.draw(st.sampled_from(sorted(self.running)))
        self.running[request] = number
        self.worker.take_over(number, request)

    @rule(ms=st.sampled_from([1, SHARE_TELL_MS, WANTING_MS]))
    def passes(self, ms: int) -> None:
        self.worker.later(ms)

    @rule()
    def rests(self) -> None:
        """When all has been told, what is free is offered, to nobody more than that."""
        self.worker.later()
        free = self.slots - len(self.running)
        offered = [self.worker.free(number) for number in range(3)]
        assert sum(max(0, slots) for slots in offered) >= free
        assert max(offered) <= free

    @invariant()
    def counts(self) -> None:
        assert self.worker.sessions.held == len(self.running) <= self.slots
        for number, session in enumerate(self.worker.each):
            assert {stream.request for stream in session.streams.values()} == {
                request for request, at in self.running.items() if at == number
            }


Sharing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase


def test_a_session_alone_shares_with_nobody() -> None:
    """The worker of one controller may be given what a hung engine holds, and says nothing of others."""
    worker = Worker(1, slots=1)
    assert worker.dispatch(0, 1)
    assert worker.dispatch(0, 2)
    worker.later()
    assert not worker.loads[0]
    assert isinstance(worker.each[0], WorkerSession)
