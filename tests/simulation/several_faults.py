"""Deliberate faults in what several controllers have to do with each other: their shares of a worker, and requests that move."""

from __future__ import annotations

import pytest

from tests.simulation.deliberate import fault
from zfabric.core.controller import peers, searches
from zfabric.core.worker import reports, sessions, tables


@fault("everybody was there", "client link cut", controllers=3)
def a_worker_that_is_never_asked(patch: pytest.MonkeyPatch) -> None:
    """What a client claims that came from another controller is given up."""
    patch.setattr(searches.Searches, "_ask", lambda self, worker, group: None)


@fault("requests with", quiet=True, fault_ms=2_000, controllers=3)
def a_worker_that_is_overrun(patch: pytest.MonkeyPatch) -> None:
    """Two controllers send for one slot, and neither is told."""
    patch.setattr(sessions.WorkerSessions, "overrun", False)


@fault("at rest", "client link cut", controllers=2)
def a_former_controller_that_is_told_nothing(patch: pytest.MonkeyPatch) -> None:
    """A request that goes on by another controller holds its slot at the former one."""
    patch.setattr(tables.StreamTables, "_tell", lambda self, instance, request, attempt, error: None)


@fault("ended 0 times", quiet=True, first=1_080, controllers=2)
def a_share_for_nobody(patch: pytest.MonkeyPatch) -> None:
    """Slots are kept for a controller whose clients wait no more, of which it cannot say so."""
    patch.setattr(reports.WorkerReports, "_unwanted", lambda self, now_ns: None)


@fault("could take it", quiet=True, fault_ms=3_000, controllers=2)
def slots_that_others_hold_for_ever(patch: pytest.MonkeyPatch) -> None:
    """The controller does not look whether others have freed them."""
    patch.setattr(peers.WorkerPeer, "free", property(lambda self: self.load.slots - 1 - self.in_flight))
