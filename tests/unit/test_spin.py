"""Busy polling: when it begins, that it ends, and who may ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from zfabric import limits
from zfabric.client.aio import AsyncClient
from zfabric.client.sync import Client
from zfabric.controller.config import ControllerConfig
from zfabric.errors import ConfigurationError
from zfabric.transport.links import choose_spin
from zfabric.transport.spin import Spinner
from zfabric.worker.config import WorkerConfig

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


class Turns:
    """A loop that does nothing but call what is due."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[[], None]) -> None:
        self.due.append(call)

    def turn(self) -> None:
        due, self.due = self.due, []
        for call in due:
            call()


class Clock:
    now_us = 1_000

    def __call__(self) -> int:
        return self.now_us * 1_000


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(turns: Turns, clock: Clock, spin_us: int = 50) -> Spinner:
    return Spinner(cast(asyncio.AbstractEventLoop, turns), spin_us, clock)


def test_it_begins_with_work_and_ends_when_the_time_is_over(turns: Turns, clock: Clock) -> None:
    spinner = made(turns, clock)
    assert turns.due == []
    spinner.worked()
    for _ in range(49):
        clock.now_us += 1
        turns.turn()
        assert len(turns.due) == 1
    clock.now_us += 1
    turns.turn()
    assert turns.due == []
    # It begins again with the next work, not before.
    clock.now_us += 1_000
    turns.turn()
    assert turns.due == []
    spinner.worked()
    assert len(turns.due) == 1


def test_work_while_it_spins_makes_it_longer_and_not_more(turns: Turns, clock: Clock) -> None:
    spinner = made(turns, clock)
    for _ in range(10):
        spinner.worked()
        clock.now_us += 40
        turns.turn()
        assert len(turns.due) == 1
    clock.now_us += 9
    turns.turn()
    assert len(turns.due) == 1
    clock.now_us += 1
    turns.turn()
    assert turns.due == []


def test_a_link_that_is_closed_spins_no_more(turns: Turns, clock: Clock) -> None:
    spinner = made(turns, clock)
    spinner.worked()
    spinner.close()
    turns.turn()
    assert turns.due == []
    spinner.worked()
    spinner.close()
    assert turns.due == []


@pytest.mark.parametrize("make", LOOPS)
def test_a_real_loop_does_not_sleep_meanwhile_and_does_afterwards(make: Callable[[], Any]) -> None:
    """Its turns are counted while the clock stands still; when the time is over it calls nothing more."""
    clock, looked = Clock(), 0

    async def main() -> None:
        nonlocal looked
        loop = asyncio.get_running_loop()

        def now() -> int:
            nonlocal looked
            looked += 1
            # Nothing else would wake the loop: it comes here again only since it spins.
            if looked == 1_000:
                clock.now_us += 50
                loop.call_later(0.01, over.set)
            return clock()

        over = asyncio.Event()
        Spinner(loop, 50, now).worked()
        await over.wait()

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
    assert looked == 1_000


def test_it_is_off_by_default_and_the_environment_turns_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZFABRIC_SPIN_US", raising=False)
    assert choose_spin(None, None) == 0
    assert choose_spin(None, "libzmq") == 0
    assert choose_spin(50, "loop") == 50
    monkeypatch.setenv("ZFABRIC_SPIN_US", "70")
    assert choose_spin(None, None) == 70
    assert choose_spin(0, None) == 0
    monkeypatch.setenv("ZFABRIC_SPIN_US", "")
    assert choose_spin(None, None) == 0


@pytest.mark.parametrize("spin_us", [-1, limits.SPIN_US_MAX + 1, 1.5, "many", True])
def test_what_is_no_time_is_told_with_its_bounds(spin_us: Any) -> None:
    for make in (AsyncClient, Client, ControllerConfig, WorkerConfig):
        with pytest.raises(ConfigurationError, match=r"spin_us is .*, it must be a whole number .* 0 … 10000"):
            make(spin_us=spin_us)


def test_an_environment_that_is_no_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFABRIC_SPIN_US", "fast")
    with pytest.raises(ConfigurationError, match=r"ZFABRIC_SPIN_US is 'fast'"):
        AsyncClient()


def test_libzmq_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (AsyncClient, ControllerConfig, WorkerConfig):
        with pytest.raises(
            ConfigurationError, match=r"spin_us is 50, and transport libzmq cannot .* use transport loop"
        ):
            make(spin_us=50, transport="libzmq")
    monkeypatch.setenv("ZFABRIC_SPIN_US", "50")
    with pytest.raises(ConfigurationError, match=r"ZFABRIC_SPIN_US is 50, and transport libzmq"):
        WorkerConfig(transport="libzmq")
    assert WorkerConfig(transport="libzmq", spin_us=0).spin_us == 0
