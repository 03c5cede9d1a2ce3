"""Proof that the checkers bite: each deliberate fault in the library is caught, by the checker that is there for it."""

from __future__ import annotations

import pytest

from tests.simulation import core_faults, edge_faults  # noqa: F401 — they enter themselves
from tests.simulation.deliberate import FAULTS
from zfabric.testing import ClusterOptions, Violation, simulate

#: Clusters in which each fault has to show.
CLUSTERS = 400


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTS)
def test_the_checkers_bite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deliberate = FAULTS[name]
    deliberate.patch(monkeypatch)
    with pytest.raises(Violation, match=deliberate.seen):
        _simulate_all(ClusterOptions(faults=deliberate.faults))


def _simulate_all(options: ClusterOptions) -> None:
    for seed in range(CLUSTERS):
        simulate(seed, options)
