"""What a run is asked for, and what it tells."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Size and duration of a run.

    Attributes:
        controllers: How many.
        workers, clients: How many at most; a run draws its own numbers.
        requests: How many at most.
        faults: Kinds of faults that happen, all of them in every run; None is a few of all kinds, drawn for each run.
        fault_ms: How long faults happen.
        heal_ms: How long everything may take to come to rest after the last fault.
        operators: Whether operators act in some of the runs.
        versions: Whether in some of the runs some connections have an end of the version before.
    """

    controllers: int = 1
    workers: int = 4
    clients: int = 4
    requests: int = 40
    faults: tuple[str, ...] | None = None
    fault_ms: int = 12_000
    heal_ms: int = 150_000
    operators: bool = True
    versions: bool = True


@dataclass
class Report:
    """What happened in a run.

    Attributes:
        seed: Replays it.
        faults: Injected, by kind.
        operations: Requests by what they ask, and queries.
        connections: Those of which both ends are of this version, and others.
        outcomes: Terminals, by the name of the error, or "done".
        hostile: Messages of outsiders, by kind.
        failovers: Attempts beyond the first.
        recovered: Streams put together again after a controller's start.
        steps: Things that happened.
    """

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    connections: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    failovers: int = 0
    recovered: int = 0
    steps: int = 0
