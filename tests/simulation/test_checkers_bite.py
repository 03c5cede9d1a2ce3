"""Proof that the checkers bite: each deliberate fault in the library is caught, by the checker that is there for it."""

from __future__ import annotations

import re

import pytest

from tests.simulation import core_faults, edge_faults, several_faults  # noqa: F401 — they enter themselves
from tests.simulation.deliberate import FAULTS
from zfabric.testing import ClusterOptions, Violation, simulate

#: Clusters in which each fault has to show.
CLUSTERS = 400


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTS)
def test_the_checkers_bite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deliberate = FAULTS[name]
    deliberate.patch(monkeypatch)
    others: list[str] = []
    # The seeds are of runs without operators and other versions.
    options = ClusterOptions(
        faults=deliberate.faults,
        fault_ms=deliberate.fault_ms,
        controllers=deliberate.controllers,
        operators=False,
        versions=False,
    )
    for seed in range(deliberate.first, deliberate.first + CLUSTERS):
        try:
            simulate(seed, options)
        except Violation as violation:
            if re.search(deliberate.seen, str(violation)):
                return
            others.append(str(violation))
    pytest.fail(f"no checker says {deliberate.seen!r}; {len(others)} other violations, the first: {others[:1]}")
