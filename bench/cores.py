"""Which cores the processes of a system run on: each on its own, where there are enough."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

#: A process has a thread that works and one that sends and receives.
_CORES_EACH: Final = 2
#: Most systems have a worker, a hop and a client.
USUAL_MEMBERS: Final = 3


def usable() -> list[int]:
    """Cores that this process may run on; none where the platform does not let them be chosen."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def shares(cores: Sequence[int], members: int) -> list[list[int]]:
    """Cores of each member, none at all if there are fewer than two for each: then the scheduler does better."""
    each = len(cores) // members
    if each < _CORES_EACH:
        return []
    return [list(cores[member * each : (member + 1) * each]) for member in range(members)]


def pin(pid: int, cores: Sequence[int]) -> None:
    """Keep a process, and all that it starts from now on, on these cores."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, cores)
