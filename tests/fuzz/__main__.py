"""Fuzz every door: `python -m tests.fuzz --inputs 5000000`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import TARGETS, Target

_ROOT: Final = Path(__file__).resolve().parents[2]
_LONGEST: Final = 4_096
_DONE: Final = re.compile(r"^#(\d+)\s+DONE\s+cov: (\d+)", re.MULTILINE)


class Outcome(NamedTuple):
    """What became of one target."""

    target: Target
    inputs: int
    seconds: float
    edges: int
    found: list[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=5_000_000, help="of all targets together (5,000,000)")
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="only this one; repeat for several")
    parser.add_argument(
        "--corpus", type=Path, default=_ROOT / ".fuzz", help="where inputs that reach new code are kept"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's chance")
    given = parser.parse_args(arguments)
    targets = [TARGETS[name] for name in given.target or TARGETS]
    console = Console()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(_fuzz, target, given.inputs // len(targets), given.corpus, given.seed) for target in targets
        ]
        outcomes = []
        for job in jobs:
            outcome = job.result()
            outcomes.append(outcome)
            console.print(
                f"{outcome.target.name}: {outcome.inputs:,} inputs in {outcome.seconds:.0f} s", highlight=False
            )
    _show(console, outcomes, given.corpus)
    for outcome in outcomes:
        for path in outcome.found:
            console.print(f"found by {outcome.target.name}: {path}", style="red")
    return 1 if any(outcome.found for outcome in outcomes) else 0


def _fuzz(target: Target, inputs: int, corpus: Path, seed: int) -> Outcome:
    """Run a target in a process of its own until it has had its inputs, or something is found."""
    home, found = corpus / target.name, corpus / "found" / target.name
    for directory in (home, found):
        directory.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (home / f"seed-{number}").write_bytes(data)
    before = set(found.iterdir())
    started = time.monotonic()
    command = [
        sys.executable, "-m", "tests.fuzz.guided", target.name, f"-runs={inputs}", f"-seed={seed}", f"-max_len={_LONGEST}",
        "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={found}/", str(home),
    ]  # fmt: skip
    log = corpus / f"{target.name}.log"
    with log.open("w") as told:
        subprocess.run(command, cwd=_ROOT, stdout=told, stderr=told, check=False)
    done = _DONE.search(log.read_text(errors="replace"))
    new = sorted(set(found.iterdir()) - before)
    if done is None and not new:
        raise SystemExit(f"{target.name}: the fuzzer ended without a result, see {log}")
    counted, edges = (int(done[1]), int(done[2])) if done is not None else (0, 0)
    return Outcome(target, counted, time.monotonic() - started, edges, new)


def _show(console: Console, outcomes: Sequence[Outcome], corpus: Path) -> None:
    table = Table("target", box=None)
    for title in ("inputs", "seconds", "inputs/s", "edges", "kept", "lines reached", "found"):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        kept = corpus / outcome.target.name
        reached = _lines(corpus, [outcome.target])
        row = (
            outcome.inputs,
            round(outcome.seconds),
            round(outcome.inputs / outcome.seconds),
            outcome.edges,
            len(list(kept.iterdir())),
        )
        table.add_row(outcome.target.name, *(f"{value:,}" for value in row), f"{reached:.0%}", str(len(outcome.found)))
    console.print(table)
    together = _lines(corpus, [outcome.target for outcome in outcomes])
    console.print(
        f"{sum(outcome.inputs for outcome in outcomes):,} inputs, {together:.0%} of all lines of these modules",
        highlight=False,
    )


def _lines(corpus: Path, targets: Sequence[Target]) -> float:
    """Which part of targets' modules is run by what was kept: all that reaches code which nothing else reaches."""
    command = [sys.executable, "-m", "tests.fuzz.reached", str(corpus), *(target.name for target in targets)]
    return float(subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    raise SystemExit(main())
