"""A request under which worker after worker dies ends, and one that goes on from worker to worker does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_client_session import Wire, lost
from zfabric import AsyncClient, Client
from zfabric.core.client.pending import Pending
from zfabric.errors import (
    ConfigurationError,
    ConnectionLostError,
    EngineStalledError,
    FabricError,
    PoisonousRequestError,
    WorkerDrainingError,
)
from zfabric.limits import ATTEMPTS_WITHOUT_PROGRESS_MAX

DRAINED = WorkerDrainingError("the worker leaves")
HUNG = EngineStalledError("no step for a minute")
CUT = ConnectionLostError("units were lost on the way")


def _run(losses: Sequence[FabricError | None], **options: Any) -> tuple[Wire, Pending, Any]:
    """A request under which this happens, in order; None for a unit of its answer."""
    wire = Wire(**options)
    wire.up()
    pending, reader = wire.submit()
    for loss in losses:
        if reader.ends:
            break
        if loss is None:
            wire.chunk(pending, "a", [1])
        else:
            wire.end(pending, loss)
    return wire, pending, reader


@pytest.mark.parametrize("deaths_max", [1, 2, 3])
@pytest.mark.parametrize("death", [lost(), HUNG], ids=["lost", "hung"])
def test_it_ends_after_so_many_deaths(deaths_max: int, death: FabricError) -> None:
    _, pending, reader = _run([death] * (deaths_max - 1), deaths_max=deaths_max)
    assert not reader.ends
    assert pending.attempt == deaths_max - 1
    _, _, reader = _run([death] * deaths_max, deaths_max=deaths_max)
    assert isinstance(reader.error, PoisonousRequestError)
    assert reader.error.details == {"deaths": deaths_max}
    assert not reader.error.retryable
    assert death.message in reader.error.message


def test_two_deaths_are_enough_by_default() -> None:
    _, _, reader = _run([lost(), lost()])
    assert isinstance(reader.error, PoisonousRequestError)


def test_what_is_no_death_is_none() -> None:
    for losses in ([lost(), DRAINED], [DRAINED, lost()], [CUT, lost()], [lost(), CUT, DRAINED]):
        _, _, reader = _run(losses)
        assert not reader.ends


def test_an_answer_that_goes_on_is_none_that_kills() -> None:
    _, pending, reader = _run([None, lost()] * 20)
    assert not reader.ends
    assert pending.attempt == 20
    # The worker dies at some unit, and the next one at once.
    _, _, reader = _run([None, None, lost(), lost()])
    assert isinstance(reader.error, PoisonousRequestError)
    # A drain after progress forgets what was before the progress.
    _, _, reader = _run([lost(), None, DRAINED, lost()])
    assert not reader.ends


def test_a_worker_that_may_come_back_is_not_dead_yet() -> None:
    wire, pending, reader = _run([lost(), lost(claim_ms=1_500)])
    assert not reader.ends
    assert pending.attempt == 1
    wire.end(pending, lost())
    assert isinstance(reader.error, PoisonousRequestError)
    assert reader.error.details == {"deaths": 2}


@settings(max_examples=200)
@given(st.integers(1, 3), st.lists(st.sampled_from(["unit", "lost", "hung", "drained", "cut"]), max_size=12))
def test_it_ends_with_the_last_of_so_many_deaths_and_never_before(deaths_max: int, events: list[str]) -> None:
    losses = {"unit": None, "lost": lost(), "hung": HUNG, "drained": DRAINED, "cut": CUT}
    deaths = barren = 0
    expected: str | None = None
    for event in events:
        if event == "unit":
            deaths = barren = 0
            continue
        deaths += event in ("lost", "hung")
        if event in ("lost", "hung") and deaths >= deaths_max:
            expected = "poisonous"
        elif barren >= ATTEMPTS_WITHOUT_PROGRESS_MAX:
            expected = "lost"
        if expected:
            break
        barren += 1
    _, _, reader = _run([losses[event] for event in events], deaths_max=deaths_max)
    assert bool(reader.ends) is bool(expected)
    if expected:
        assert isinstance(reader.error, PoisonousRequestError) is (expected == "poisonous")


@pytest.mark.parametrize("kind", [AsyncClient, Client])
@pytest.mark.parametrize("value", [0, 4, -1, "two"])
def test_only_so_many_can_be_set(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="worker_deaths_max"):
        kind("ipc:///tmp/none.sock", worker_deaths_max=value)
