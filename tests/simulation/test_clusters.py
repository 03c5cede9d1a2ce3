"""Clusters under faults and among outsiders: fresh seeds each time, and every seed that ever failed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest

from zfabric.testing import ClusterOptions, Report, simulate
from zfabric.wire.fields import Operation

#: What each of these found is in the history of the code that it changed.
REGRESSIONS = (
    330, 497, 800, 1478, 2007, 2223, 40_887, 910_528, 2_000_814, 5_001_686, 8_002_272, 8_007_393, 20_002_813,
)  # fmt: skip
#: The same, of clusters with operators and versions.
LATER_REGRESSIONS = (766_198_425_365, 799_112_357_334)
FRESH = 200
#: Clusters of so many controllers that nobody has seen before, and those of which some once failed.
SEVERAL = {2: 30, 3: 25, 5: 15}
SEVERAL_REGRESSIONS = ((1080, 2),)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_seeds_that_once_failed(seed: int) -> None:
    """As they were when they failed: before there were operators, and versions."""
    simulate(seed, ClusterOptions(operators=False, versions=False))


@pytest.mark.parametrize("seed", LATER_REGRESSIONS)
def test_seeds_that_failed_later(seed: int) -> None:
    simulate(seed)


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Of clusters that nobody has seen before."""
    first = random.SystemRandom().randrange(2**40)
    return [simulate(seed) for seed in range(first, first + FRESH)]


def _sum(counters: list[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


def test_fresh_seeds(reports: list[Report]) -> None:
    assert _sum([report.outcomes for report in reports])["done"] > FRESH
    assert sum(report.failovers for report in reports) > FRESH / 10
    assert sum(report.recovered for report in reports) > 0


def test_everything_that_is_simulated_happens(reports: list[Report]) -> None:
    """Faults of all kinds, all operations, and outsiders that say everything that there is to say."""
    assert set(_sum([report.operations for report in reports])) == {*get_args(Operation), "query"}
    assert len(_sum([report.faults for report in reports])) == 18 + 6
    assert set(_sum([report.connections for report in reports])) == {"older", "newer"}
    said = _sum([report.hostile for report in reports])
    assert set(said) == {
        "CLIENT_HELLO", "SUBMIT", "CANCEL", "CREDIT", "QUERY", "CLAIMS", "BEAT", "GOODBYE",
        "WORKER_HELLO", "CHUNKS", "ENDS", "LOAD", "CARRIED",
    }  # fmt: skip


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(10):
        assert simulate(seed) == simulate(seed)


def test_a_run_is_the_same_in_another_process() -> None:
    code = "from zfabric.testing import simulate; print([simulate(seed).steps for seed in range(6)])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str([simulate(seed).steps for seed in range(6)])


def test_several_controllers() -> None:
    reports = []
    for controllers, count in SEVERAL.items():
        first = random.SystemRandom().randrange(2**40)
        options = ClusterOptions(controllers=controllers)
        reports += [simulate(seed, options) for seed in range(first, first + count)]
    assert _sum([report.outcomes for report in reports])["done"] > len(reports)
    assert sum(report.recovered for report in reports) > 0
    assert "LOCATED" in _sum([report.hostile for report in reports])
    assert "controller unplugged" in _sum([report.faults for report in reports])


@pytest.mark.parametrize(("seed", "controllers"), SEVERAL_REGRESSIONS)
def test_seeds_of_several_controllers_that_once_failed(seed: int, controllers: int) -> None:
    simulate(seed, ClusterOptions(controllers=controllers))
