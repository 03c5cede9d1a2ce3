"""python -m bench: run scenarios, list them, compare two runs."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, cast

import cyclopts
from rich.console import Console
from rich.table import Table as RichTable

from bench import compare as comparing
from bench.html import page
from bench.machine import environment
from bench.record import Report, write
from bench.runner import Bench, Scenario, run
from bench.subjects import beside
from zfabric.transport.links import TRANSPORT_VARIABLE, Transport

#: In the order of a run.
NAMES: Final = (
    "relay",
    "one_token",
    "streams",
    "many",
    "paced",
    "gateway",
    "scale",
    "balance",
    "placement",
    "scaling",
    "cells",
    "faults",
    "curve",
    "recording",
    "controllers",
    "metrics",
    "engines",
)
#: The default first: noise differs from run to run, so drivers are compared within one.
TRANSPORTS_COMPARED: Final[tuple[Transport, ...]] = ("loop", "libzmq")
RESULTS: Final = Path(__file__).parent / "results"

HELP = """Measure zfabric beside what could be used instead.

**Examples**

`python -m bench` runs all scenarios quickly; `python -m bench --full` takes longer and adds the real engines

`python -m bench --scenario streams --system zfabric --system vllm-router`

`python -m bench --transport libzmq` runs zfabric on libzmq's driver, in all scenarios; `--transport libzmq --transport loop` puts
the loop's beside it where drivers are compared, which is in one-token and streams

`python -m bench --scenario balance --trace mooncake.jsonl`

`python -m bench compare bench/results/before.json bench/results/after.json`
"""

app = cyclopts.App(name="python -m bench", help=HELP, help_format="markdown", version_flags=[])
console = Console(highlight=False)


def scenarios(names: Sequence[str] = NAMES) -> list[Scenario]:
    """Modules of `bench.scenarios`; a scenario's own name is taken as well."""
    found = [importlib.import_module(f"bench.scenarios.{name.replace('-', '_')}") for name in names]
    return [cast("Scenario", module) for module in found]


@app.default
def benchmark(
    *,
    full: Annotated[bool, cyclopts.Parameter(negative=())] = False,
    list_: Annotated[bool, cyclopts.Parameter(name="--list", negative=())] = False,
    scenario: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=False)] = (),
    system: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=False)] = (),
    trace: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=False)] = (),
    transport: Annotated[tuple[Transport, ...], cyclopts.Parameter(consume_multiple=False)] = TRANSPORTS_COMPARED,
    output: Path = RESULTS,
) -> int:
    """Run scenarios and write their results.

    Args:
        full: More and longer rounds, and the real engines.
        list_: List the scenarios.
        scenario: Only these; repeat for several.
        system: Only these systems; repeat for several.
        trace: Arrivals for balance: Mooncake, Azure or BurstGPT files, or flight recordings; repeat for several. Mooncake's also
            say what prompts share, for placement.
        transport: The driver of zfabric's sockets, loop or libzmq; what is repeated is measured beside the first.
        output: Directory of the results.
    """
    if list_:
        for module in scenarios():
            console.print(f"{module.NAME:<10} {module.TITLE}")
        return 0
    picked = scenarios(scenario or NAMES)
    profile = "full" if full else "quick"
    # Whatever is started, and however, is on the first.
    os.environ[TRANSPORT_VARIABLE] = transport[0]
    stamp = {**environment(profile), "transport": list(transport)}
    began = time.perf_counter()
    with console.status("starting") as status:

        def say(text: str) -> None:
            status.update(f"{time.perf_counter() - began:4.0f} s  {text}")

        others = tuple(dict.fromkeys(beside(name) for name in transport if name != transport[0]))
        reports = asyncio.run(run(picked, Bench(not full, say, frozenset(system), traces=trace, beside=others)))
    name = stamp["started"].replace(":", "").replace("+0000", "Z").replace("-", "")
    write(output / f"{name}-{profile}.json", stamp, reports)
    (output / f"{name}-{profile}.html").write_text(page(stamp, reports), encoding="utf-8")
    _show(reports)
    console.print(f"{time.perf_counter() - began:.0f} s · {output / name}-{profile}.html", soft_wrap=True)
    return 0 if any(report.metrics for report in reports) else 1


def _show(reports: Sequence[Report]) -> None:
    table = RichTable("metric", "value", "goal", "against", "")
    for metric in (metric for report in reports for metric in report.metrics if metric.goal is not None):
        sign = "≥" if metric.better == "higher" else "≤"
        word = "[green]met" if metric.met else "[yellow]missed"
        table.add_row(
            metric.name, f"{metric.value:,.4g} {metric.unit}", f"{sign} {metric.goal:g}", metric.reference, word
        )
    console.print(table)
    for text in (text for report in reports for text in report.skipped):
        console.print(f"left out: {text}", style="dim", markup=False, soft_wrap=True)


@app.command
def compare(before: Path, after: Path, /) -> int:
    """Show what changed between two full result files by more than their noise. Exits with 1 if anything got worse."""
    changes = comparing.compare(comparing.load(before), comparing.load(after))
    table = RichTable("metric", "before", "after", "ratio", "")
    for change in changes:
        table.add_row(
            change.name,
            f"{change.before:,.4g}",
            f"{change.after:,.4g} {change.unit}",
            f"{change.ratio:.2f}",
            change.verdict,
        )
    console.print(table)
    return int(any(change.verdict == "worse" for change in changes))


if __name__ == "__main__":
    raise SystemExit(app())
