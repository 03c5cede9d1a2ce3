"""The wire of version 2.0, as it was recorded, against the code of today.

Three things are held against it: that each side says today what it said then, and more only at the end; that each side
understands what was said then; and that the simulator's peers of version 2.0 say no more than was said.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import msgspec
import pytest

from tests.broker import Bench, FakeClient, faults
from tests.recorded.wire import ROLES, Said, Talk, held, recorded
from zfabric.core.worker.session import DrainAsked
from zfabric.errors import RequestError
from zfabric.limits import BAD_FRAMES_MAX
from zfabric.testing.older import FIELDS, as_of_2_0
from zfabric.wire import codec, kinds
from zfabric.wire.messages import ClientHello
from zfabric.wire.questions import Answer

FORMER = recorded()


def assert_said_before(now: Said, before: Said) -> None:
    """But for what a later version adds: fields at the end, and names in maps of answers to questions."""
    assert (now.sender, now.receiver) == (before.sender, before.receiver)
    assert bool(now.body) == bool(before.body)
    if before.body:
        assert_goes_on(msgspec.msgpack.decode(now.body), msgspec.msgpack.decode(before.body))
    if now.header[0] == kinds.ANSWER:
        assert_has(_answer(now.header), _answer(before.header))
    elif now.header[0] == kinds.CHUNKS:
        assert now.header[: codec.ROUTE_BYTES] == before.header[: codec.ROUTE_BYTES]
        said = [msgspec.msgpack.decode(header[codec.ROUTE_BYTES :]) for header in (now.header, before.header)]
        assert_goes_on(*said)
    else:
        assert as_of_2_0(now.header) == before.header


def assert_goes_on(now: Any, before: Any) -> None:
    """An array begins as it did, and so do those in it."""
    if isinstance(before, list):
        assert len(now) >= len(before)
        for one, other in zip(now, before, strict=False):
            assert_goes_on(one, other)
    else:
        assert now == before


def _answer(header: bytes) -> Any:
    answer = msgspec.msgpack.decode(header[1:], type=Answer)
    return [
        answer.number,
        answer.code,
        answer.message,
        answer.details,
        msgspec.msgpack.decode(answer.result),
        answer.more,
    ]


def assert_has(now: Any, before: Any) -> None:
    """All that was told is still told."""
    if isinstance(before, dict):
        assert before.keys() <= now.keys()
        for name, value in before.items():
            assert_has(now[name], value)
    elif isinstance(before, list):
        assert len(now) == len(before)
        for one, other in zip(now, before, strict=True):
            assert_has(one, other)
    else:
        assert now == before


def test_each_side_says_what_it_said_and_more_only_at_the_end() -> None:
    said = held().said
    assert len(said) == len(FORMER)
    for now, before in zip(said, FORMER, strict=True):
        assert_said_before(now, before)


@pytest.mark.parametrize(
    "replaced", [roles for count in (1, 2, 3) for roles in itertools.combinations(ROLES, count)], ids=" and ".join
)
def test_peers_of_that_version_are_understood(replaced: Collection[str]) -> None:
    """Streams that lose their client, their worker and their controller lose no token, whoever is of that version: `held`
    looks at them."""
    talk = held(FORMER, replaced)
    assert_lived(talk)
    for now, before in zip(talk.said, FORMER, strict=True):
        assert_said_before(now, before)


def assert_lived(talk: Talk) -> None:
    """What they were asked, they did."""
    refused, answered = talk.asker.answers[5][0], [error for error, _ in talk.asker.answers if error is None]
    assert isinstance(refused, RequestError)
    assert len(answered) == 6
    assert [order for order in talk.orders if isinstance(order, DrainAsked)] == [DrainAsked(500)]
    assert talk.broker.bad_frames == 0
    assert (talk.client.counters.gaps, talk.client.counters.faults, talk.client.counters.broken) == (0, 0, 0)


def test_a_minor_version_is_spoken_that_both_know() -> None:
    minor = kinds.MINOR_VERSION
    for replaced, client, worker in (((), minor, minor), (("client",), 0, minor), (("worker",), minor, 0)):
        talk = Talk(FORMER, replaced)
        talk.worker.announce([], 0)
        talk.connect("worker")
        talk.connect("client")
        (known,) = talk.broker.registry.workers.values()
        (peer,) = talk.broker.registry.clients.values()
        assert (peer.minor, known.minor) == (client, worker)
        welcomes = [it.header for it in talk.said if it.header[0] == kinds.WELCOME]
        assert [msgspec.msgpack.decode(header[1:])[8] for header in welcomes] == [worker, client]


def test_what_a_later_version_has_besides_is_refused_and_costs_no_session() -> None:
    """Whoever announces a later minor version may say what this one does not know: it is told each time, and does without."""
    bench = Bench()
    later = FakeClient(bench)
    hello = ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=11, minor=kinds.MINOR_VERSION + 1)
    packed, _ = codec.pack(hello)
    later.send(packed[:1] + msgspec.msgpack.encode([*msgspec.msgpack.decode(packed[1:]), "what comes later"]))
    assert later.welcome.minor == kinds.MINOR_VERSION
    for _ in range(2 * BAD_FRAMES_MAX):
        later.send(b"\x7f\x90")
    told = faults(later)
    assert len(told) == 2 * BAD_FRAMES_MAX
    assert "127" in told[0].message
    assert later.ask("models")
    other = bench.client(12)
    for _ in range(BAD_FRAMES_MAX):
        other.send(b"\x7f\x90")
    assert other.refusal is not None


def test_the_simulators_peers_of_that_version_say_what_was_said() -> None:
    """It cuts messages to as many fields as they had."""
    lengths: dict[int, set[int]] = {}
    for said in FORMER:
        if said.header[0] != kinds.CHUNKS and len(said.header) > 1:
            lengths.setdefault(said.header[0], set()).add(len(msgspec.msgpack.decode(said.header[1:])))
        assert as_of_2_0(said.header) == said.header
    assert lengths == {kind: {FIELDS[kind]} for kind in lengths}
    assert lengths.keys() >= {
        kinds.CLIENT_HELLO,
        kinds.WORKER_HELLO,
        kinds.WELCOME,
        kinds.SUBMIT,
        kinds.DISPATCH,
        kinds.LOAD,
    }
