"""When a client leaves a controller that says nothing."""

from __future__ import annotations

import random

from msgspec import Struct

from zfabric.core.client.session import ClientSession
from zfabric.core.client.silence import ANSWERED, Silence
from zfabric.errors import QuotaExceededError
from zfabric.ids import milliseconds
from zfabric.limits import FRAME_BYTES_MAX, PROBE_FORGET_MS, PROBE_MS, PROBE_MS_MAX, PROBE_QUIET_MS, PROBES_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.answers import ChunkExtra, Outcome
from zfabric.wire.messages import Beat, Goodbye, Welcome
from zfabric.wire.payloads import TextRequest


class Sink:
    """Reads, and does nothing with it."""

    def arrived(self, index: int, text: str, token_ids: list[int], extra: ChunkExtra | None) -> None: ...

    def ended(self, error: object, outcome: Outcome | None) -> None: ...


class Client:
    """A session, of several controllers unless said, and how often it left one."""

    def __init__(self, *, several: bool = True) -> None:
        self.now_ns = 0
        self.left = 0
        self.session = ClientSession(instance=1, rng=random.Random(1))
        self.session.several = several
        self.session.leave = self._leave
        self.session.connected(0)
        self.welcome()

    def _leave(self) -> None:
        self.left += 1
        self.session.disconnected()

    def welcome(self) -> None:
        message = Welcome(
            version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=1, token=b"t", beat_ms=600_000, lease_ms=1,
            frame_bytes_max=FRAME_BYTES_MAX, minor=kinds.MINOR_VERSION,
        )  # fmt: skip
        self.say(message)
        self.session.outbox.clear()

    def say(self, message: Struct) -> None:
        self.session.receive(*codec.pack(message), self.now_ns)

    def submit(self) -> None:
        self.session.submit("generate", TextRequest(prompt="x"), Sink(), self.now_ns, model="m")
        self.session.accepted(self.now_ns)
        self.session.outbox.clear()

    def pass_ms(self, duration_ms: float, *, answers: bool = False) -> int:
        """Let time pass. Returns how often the controller was asked whether it is there."""
        until_ns, asked = self.now_ns + milliseconds(duration_ms), 0
        while (due_ns := self.session.timers.next_ns()) is not None and due_ns <= until_ns:
            self.now_ns = due_ns
            self.session.tick(due_ns)
            beats = [header for header, _ in self.session.outbox if header[0] == kinds.BEAT]
            self.session.outbox.clear()
            asked += len(beats)
            for _ in beats if answers else ():
                self.say(Beat())
        self.now_ns = until_ns
        return asked


def test_a_controller_that_is_silent_is_asked_and_then_left() -> None:
    client = Client()
    client.submit()
    assert client.pass_ms(PROBE_MS * PROBES_MAX) == PROBES_MAX - 1
    assert client.left == 0
    client.pass_ms(PROBE_MS)
    assert client.left == 1
    assert client.session.counters.moves == 1


def test_whatever_it_says_counts() -> None:
    client = Client()
    client.submit()
    for _ in range(20):
        client.pass_ms(PROBE_MS * (PROBES_MAX - 1))
        client.say(Beat())
    assert client.left == 0


def test_one_that_has_nothing_to_say_is_asked_rarely() -> None:
    client = Client()
    client.submit()
    client.pass_ms(20_000, answers=True)
    # One question in two looks.
    assert client.pass_ms(20_000, answers=True) <= 20_000 / PROBE_QUIET_MS / 2 + 1
    assert client.left == 0


def test_nobody_is_asked_where_nobody_waits_or_there_is_nobody_else() -> None:
    client = Client()
    assert client.pass_ms(10_000) == 0
    alone = Client(several=False)
    alone.submit()
    assert alone.pass_ms(10_000) == 0
    assert alone.left == 0


def test_a_session_that_is_not_opened_is_left_as_well() -> None:
    client = Client()
    client.submit()
    client.session.disconnected()
    client.session.connected(client.now_ns)
    client.pass_ms(PROBE_MS * (PROBES_MAX + 1))
    assert client.left == 1


def test_a_controller_that_stops_or_is_full_is_left_at_once() -> None:
    client = Client()
    client.say(Goodbye("stops"))
    assert client.left == 1
    client.session.connected(client.now_ns)
    client.session.receive(*codec.pack_refused(QuotaExceededError("full")), client.now_ns)
    assert client.left == 2


def test_the_next_one_is_given_more_time_for_a_while() -> None:
    silence, now_ns = Silence(), 0
    periods = []
    for _ in range(8):
        periods.append(silence.period_ms)
        while not silence.lasts(now_ns):
            now_ns += milliseconds(silence.period_ms)
    assert periods == [min(PROBE_MS << power, PROBE_MS_MAX) for power in range(8)]
    now_ns += milliseconds(PROBE_FORGET_MS)
    silence.looks = 0
    silence.lasts(now_ns)
    assert silence.period_ms == PROBE_MS


def test_an_answer_slows_the_looks_down_and_anything_else_brings_them_back() -> None:
    silence = Silence()
    for expected in (100, 200, 400, 800, 800):
        silence.looks = ANSWERED
        assert not silence.lasts(0)
        assert silence.period_ms == expected
    silence.looks = 0
    silence.lasts(0)
    assert silence.period_ms == PROBE_MS
