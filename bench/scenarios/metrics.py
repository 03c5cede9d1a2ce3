"""What it costs to be looked at: the same fabric with metrics that are read all the time, and without any."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Final

from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.stack import Outcome
from bench.subjects import HOP, WORKER

NAME = "metrics"
TITLE = "Metrics: the daemons' CPU a token while both are scraped, against a fabric that serves none"
_SUBJECTS = ("zfabric", "zfabric scraped")
#: A usual scraper comes every 15 s.
_INTERVAL_S: Final = 1.0
_ACCEPT: Final = "application/openmetrics-text; version=1.0.0"
#: How many times the CPU of a fabric without metrics they may take.
_GOAL: Final = 1.02
#: Short turns, many of them: what disturbs one of them disturbs the next as well, more often than not.
_TURN_S: Final = 0.7
_ROUNDS: Final = (25, 60)
#: By name: streams at a time, and tokens of each.
_LOADS: Final = {"streams": (64, 128), "one_token": (16, 1)}


async def run(bench: Bench, report: Report) -> None:
    """Each lane asks for an answer, and again; the engine has no compute."""
    stacks = await bench.stacks(report, _SUBJECTS)
    rows: list[list[str]] = []
    for load, (streams, tokens) in _LOADS.items():
        found = await bench.in_turn(
            report,
            stacks,
            "flood",
            rounds=_ROUNDS[0] if bench.quick else _ROUNDS[1],
            during={name: partial(_scraped, stack.pages) for name, stack in stacks.items()},
            concurrency=streams,
            tokens=tokens,
            seconds=_TURN_S,
        )
        if set(found) == set(_SUBJECTS):
            plain, scraped = ([_daemons_us(outcome) for outcome in found[name]] for name in _SUBJECTS)
            report.metric(
                f"{load}.cpu_ratio", ratios(scraped, plain), "×", "lower", goal=_GOAL, reference="without metrics"
            )
            plain, scraped = ([outcome.rate for outcome in found[name]] for name in _SUBJECTS)
            report.metric(f"{load}.rate_ratio", ratios(scraped, plain), "×", "higher")
        for name, outcomes in found.items():
            rate = percentile([outcome.rate * tokens for outcome in outcomes], 50)
            cpu = [percentile([outcome.cpu_us(role) / tokens for outcome in outcomes], 50) for role in (HOP, WORKER)]
            rows.append([load, name, f"{rate:,.0f}", *(f"{cost:.2f}" for cost in cpu)])
    columns = ["load", "system", "tokens/s", "controller", "worker"]
    report.tables.append(
        Table(f"A scrape of each daemon every {_INTERVAL_S:g} s; median CPU in µs a token", columns, rows)
    )
    report.unequal.append("What is counted is counted in both; the one beside serves it, and measures its loop's lag.")


def _daemons_us(outcome: Outcome) -> float:
    return outcome.cpu_us(HOP) + outcome.cpu_us(WORKER)


@contextlib.asynccontextmanager
async def _scraped(pages: Sequence[str]) -> AsyncIterator[None]:
    """Scrape these meanwhile, beginning at once."""
    task = asyncio.create_task(_scrape(pages))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _scrape(pages: Sequence[str]) -> None:
    while pages:
        for page in pages:
            await asyncio.to_thread(_read, page)
        await asyncio.sleep(_INTERVAL_S)


def _read(page: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(page, headers={"Accept": _ACCEPT}), timeout=10) as answer:
        answer.read()
