"""Connections without a session, counted: which one makes room."""

from __future__ import annotations

import pytest

from zfabric import limits
from zfabric.transport import loop_waiting
from zfabric.transport.loop_waiting import Waiting


class Connection:
    ended = False

    def abort(self) -> None:
        self.ended = True


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    monkeypatch.setattr(limits, "SESSIONLESS_MAX", 4)
    monkeypatch.setattr(limits, "SOURCE_SESSIONLESS_MAX", 3)
    return Waiting("SESSIONLESS_MAX", "SOURCE_SESSIONLESS_MAX")


def test_a_source_displaces_its_own_first(waiting: Waiting) -> None:
    own, others = [Connection() for _ in range(5)], [Connection() for _ in range(2)]
    waiting.begin(others[0], "b")
    for connection in own:
        waiting.begin(connection, "a")
    assert [connection.ended for connection in own] == [True, True, False, False, False]
    assert not others[0].ended
    # At the bound of all it is the oldest of all.
    waiting.begin(others[1], "c")
    assert others[0].ended
    assert (len(waiting), waiting.displaced) == (4, 3)


def test_what_counts_makes_it_the_last_to_go(waiting: Waiting) -> None:
    first, second, third, fourth = (Connection() for _ in range(4))
    for connection in (first, second, third):
        waiting.begin(connection, "a")
    waiting.again(first)
    waiting.again(fourth)
    assert len(waiting) == 3
    waiting.begin(fourth, "a")
    assert (first.ended, second.ended) == (False, True)
    for connection in (first, second, third, fourth, fourth):
        waiting.end(connection)
    assert len(waiting) == 0
    assert not waiting._by_source


def test_those_that_are_silent_for_too_long_are_out_of_it(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0
    monkeypatch.setattr(loop_waiting, "monotonic_ns", lambda: now)
    early, late = Connection(), Connection()
    waiting.begin(early, "a")
    now = 5_000_000
    waiting.begin(late, "b")
    assert not list(waiting.overdue(10))
    now = 10_000_000
    assert list(waiting.overdue(10)) == [early]
    assert len(waiting) == 1
