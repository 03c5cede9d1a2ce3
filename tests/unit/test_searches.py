"""Claims of clients that come from another controller: which workers are asked, and what becomes of the claims."""

from __future__ import annotations

from typing import Any

from tests.peers import FakeFabric, model
from zfabric.errors import ConnectionLostError, RequestCancelledError
from zfabric.limits import CLAIM_MS, SEARCHES_MAX
from zfabric.wire import codec
from zfabric.wire.flow import Grant
from zfabric.wire.load import Load
from zfabric.wire.locks import lock_of
from zfabric.wire.messages import Beat, Carried, Claim, Claims, Locate, Located


def claims(fabric: FakeFabric, *requests: int, worker: str = "", client: str = "a", moved: bool = True) -> None:
    lines = [Claim(request=number, attempt=0, next=3, window=50, moved=moved, worker=worker) for number in requests]
    fabric._receive(client, codec.pack(Claims(lines)))


def asked(fabric: FakeFabric, worker: str) -> list[Locate]:
    """LOCATEs since the last look."""
    found = [message for message in fabric.sent.get(worker, []) if isinstance(message, Locate)]
    fabric.sent[worker] = [message for message in fabric.sent.get(worker, []) if not isinstance(message, Locate)]
    return found


def has(
    fabric: FakeFabric, worker: str, locate: Locate, *requests: int, lock: bytes | None = None, **more: Any
) -> None:
    """A worker answers that it has these."""
    key = lock_of(b"a") if lock is None else lock
    lines = [
        Carried(instance=locate.instance, request=number, attempt=0, operation="generate", model="m", lock=key)
        for number in requests
    ]
    fabric._receive(worker, codec.pack(Located(number=locate.number, carried=lines, **more)))


def granted(fabric: FakeFabric, worker: str) -> list[int]:
    """Requests that a worker was told to go on with."""
    grants = [message for message in fabric.sent.get(worker, []) if isinstance(message, Grant)]
    return [line.request for grant in grants for line in grant.lines if line.again and line.next == 3]


def made(**settings: Any) -> FakeFabric:
    fabric = FakeFabric(**settings)
    for name in ("w1", "w2"):
        fabric.worker(name, model(), slots=4)
    fabric.client("a")
    return fabric


def test_the_worker_that_is_named_is_asked_alone() -> None:
    fabric = made()
    claims(fabric, 1, 2, worker="w1")
    (locate,) = asked(fabric, "w1")
    assert locate.attempts == [(1, 0), (2, 0)]
    assert asked(fabric, "w2") == []
    has(fabric, "w1", locate, 1)
    assert granted(fabric, "w1") == [1]
    # What it has not is known to be lost at once.
    assert fabric.ended("a") == [(2, ConnectionLostError)]
    fabric.end("w1", "a", 1)
    assert fabric.ended("a") == [(1, None)]


def test_all_are_asked_where_none_is_named_and_the_last_answer_decides() -> None:
    fabric = made()
    claims(fabric, 1, 2)
    (first,), (second,) = asked(fabric, "w1"), asked(fabric, "w2")
    has(fabric, "w1", first)
    assert fabric.ended("a") == []
    has(fabric, "w2", second, 2, more=True)
    assert granted(fabric, "w2") == [2]
    assert fabric.ended("a") == []
    has(fabric, "w2", second)
    assert fabric.ended("a") == [(1, ConnectionLostError)]


def test_a_claim_that_has_not_moved_is_not_looked_for() -> None:
    fabric = made()
    claims(fabric, 1, moved=False)
    assert asked(fabric, "w1") == []
    assert fabric.ended("a") == [(1, ConnectionLostError)]


def test_an_earlier_worker_is_not_asked() -> None:
    fabric = FakeFabric()
    fabric.worker("w1", model(), minor=3)
    fabric.client("a")
    claims(fabric, 1)
    assert asked(fabric, "w1") == []
    assert fabric.ended("a") == [(1, ConnectionLostError)]


def test_nobody_waits_without_end_for_an_answer() -> None:
    fabric = made()
    claims(fabric, 1, worker="w1")
    fabric.pass_ms(CLAIM_MS + 200, "w1", "w2")
    assert fabric.ended("a") == [(1, ConnectionLostError)]
    # It comes too late, and means nothing.
    has(fabric, "w1", asked(fabric, "w1")[0], 1)
    assert granted(fabric, "w1") == []
    assert fabric.broker.in_flight == 0


def test_a_worker_that_is_named_and_away_is_waited_for() -> None:
    fabric = made()
    claims(fabric, 1, worker="w3")
    fabric.worker("w3", model(), slots=4)
    (locate,) = asked(fabric, "w3")
    has(fabric, "w3", locate, 1)
    assert granted(fabric, "w3") == [1]


def test_a_worker_that_is_lost_has_answered() -> None:
    fabric = made()
    claims(fabric, 1)
    has(fabric, "w1", asked(fabric, "w1")[0])
    fabric.lose("w2")
    assert fabric.ended("a") == [(1, ConnectionLostError)]


def test_what_is_another_client_s_is_not_found() -> None:
    fabric = made()
    claims(fabric, 1, worker="w1")
    has(fabric, "w1", asked(fabric, "w1")[0], 1, lock=lock_of(b"b"))
    assert granted(fabric, "w1") == []
    assert fabric.ended("a") == [(1, ConnectionLostError)]
    assert not fabric.broker.registry.workers["w1"].live


def test_a_worker_that_says_what_is_not_so_spoils_nothing() -> None:
    fabric = made()
    claims(fabric, 1)
    (first,), (second,) = asked(fabric, "w1"), asked(fabric, "w2")
    has(fabric, "w2", second, 1, lock=lock_of(b"b"))
    assert fabric.ended("a") == []
    has(fabric, "w1", first, 1)
    assert granted(fabric, "w1") == [1]
    assert not fabric.broker.recovery.searches.instances


def test_a_worker_that_never_answers_is_kept_nothing_of() -> None:
    fabric = made()
    for number in range(20):
        claims(fabric, number, worker="w1")
        fabric.pass_ms(CLAIM_MS + 200, "w1", "w2")
    assert not fabric.broker.recovery.searches.instances


def test_what_was_not_asked_for_is_not_looked_at() -> None:
    fabric = made()
    claims(fabric, 1, worker="w1")
    (locate,) = asked(fabric, "w1")
    has(fabric, "w2", locate, 1)
    has(fabric, "w1", locate, 2, more=True)
    fabric._receive("w1", codec.pack(Located(number=999, carried=[])))
    assert granted(fabric, "w1") == granted(fabric, "w2") == []
    assert fabric.ended("a") == []
    has(fabric, "w1", locate, 1)
    assert granted(fabric, "w1") == [1]


def test_a_claim_that_its_client_has_cancelled_takes_nothing_over() -> None:
    fabric = made()
    claims(fabric, 1, worker="w1")
    fabric.cancel("a", 1)
    has(fabric, "w1", asked(fabric, "w1")[0], 1)
    assert granted(fabric, "w1") == []
    assert fabric.ended("a") == [(1, RequestCancelledError)]
    assert not fabric.broker.registry.workers["w1"].live


def test_a_new_controller_asks_and_waits_for_whoever_comes() -> None:
    fabric = FakeFabric(recovery_ms=3_000)
    fabric.client("a")
    claims(fabric, 1, 2)
    fabric.worker("w1", model(), slots=4)
    assert fabric.ended("a") == []
    claims(fabric, 3, worker="w1")
    has(fabric, "w1", asked(fabric, "w1")[0])
    # The one that had it says that it has it not.
    assert fabric.ended("a") == [(3, ConnectionLostError)]
    fabric.pass_ms(3_200, "w1")
    assert sorted(fabric.ended("a")) == [(number, ConnectionLostError) for number in (1, 2)]


def test_one_session_has_not_everybody_asked_without_end() -> None:
    fabric = made()
    claims(fabric, *range(SEARCHES_MAX + 5))
    assert sum(len(locate.attempts) for locate in asked(fabric, "w1")) == SEARCHES_MAX
    assert len(fabric.ended("a")) == 5
    # What a worker is named for is asked all the same.
    claims(fabric, 9_000, worker="w1")
    assert [locate.attempts for locate in asked(fabric, "w1")] == [[(9_000, 0)]]


def test_slots_of_others_are_not_given_away() -> None:
    fabric = FakeFabric()
    fabric.worker("w1", model(), slots=0)
    fabric.client("a")
    fabric._receive("w1", codec.pack(Load(slots=2, elsewhere=1)))
    for number in (1, 2):
        fabric.submit("a", number)
    assert fabric.taken("w1") == [1]
    fabric._receive("w1", codec.pack(Load(slots=2, elsewhere=0)))
    assert fabric.taken("w1") == [2]


def test_a_worker_is_told_how_many_clients_wait_for_its_slots() -> None:
    fabric = FakeFabric()
    fabric.worker("w1", model(), slots=1)
    for name in ("a", "b"):
        fabric.client(name)
        for number in range(3):
            fabric.submit(name, number)
    fabric.load("w1", slots=1)
    assert [beat.wanting for beat in fabric.sent["w1"] if isinstance(beat, Beat)][-1] == 2
