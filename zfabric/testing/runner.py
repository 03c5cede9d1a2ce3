"""Simulate clusters: python -m zfabric.testing --seeds 1000, or one again with --seed N. With --recording FILE, the workers,
requests and losses are those of a flight recording (repeat it for those of workers), and seeds draw what it does not tell.

Exit code 1 if a promise was broken; the seed is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from zfabric.errors import ConfigurationError
from zfabric.recording.reader import read_recordings
from zfabric.testing.cluster import simulate
from zfabric.testing.incident import simulate_recording
from zfabric.testing.records import Violation
from zfabric.testing.reports import ClusterOptions, Report

#: Seeds that one process takes at a time.
_PORTION = 20


def _attempt(seed: int, recordings: Sequence[Path] = (), controllers: int = 1) -> Report | str:
    try:
        options = ClusterOptions(controllers=controllers)
        return simulate_recording(recordings, seed) if recordings else simulate(seed, options)
    except Violation as violation:
        return str(violation)


def _reports(seeds: range, jobs: int, recordings: Sequence[Path], controllers: int) -> Iterator[Report | str]:
    attempt = partial(_attempt, recordings=recordings, controllers=controllers)
    if jobs == 1:
        yield from map(attempt, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(attempt, seeds, chunksize=_PORTION)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="how many clusters")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--controllers", type=int, default=1, help="of each cluster")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--recording", type=Path, action="append", default=[], help="a flight recording; repeat it")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.seed is not None:
        seeds, arguments.jobs = range(arguments.seed, arguments.seed + 1), 1
    started = time.monotonic()
    faults: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    hostile: Counter[str] = Counter()
    failed: list[str] = []
    failovers = recovered = 0
    try:
        read_recordings(arguments.recording)
    except ConfigurationError as error:
        parser.error(str(error))
    for done, report in enumerate(_reports(seeds, arguments.jobs, arguments.recording, arguments.controllers), start=1):
        if isinstance(report, str):
            failed.append(report)
            _say(f"\nBROKEN {report}\n")
        else:
            faults += report.faults
            operations += report.operations
            outcomes += report.outcomes
            hostile += report.hostile
            failovers += report.failovers
            recovered += report.recovered
        if done % 50 == 0 or done == len(seeds):
            _say(f"\r{done}/{len(seeds)} clusters, {len(failed)} broken, {time.monotonic() - started:.0f} s ")
    _say("\n")
    told = (("faults", faults), ("requests", operations), ("terminals", outcomes), ("outsiders said", hostile))
    for title, counter in told:
        _say(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items())) + "\n")
    _say(f"failovers {failovers:,}, streams recovered after a controller's death {recovered:,}\n")
    return 1 if failed else 0


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
