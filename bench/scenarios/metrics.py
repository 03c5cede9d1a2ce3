"""What it costs to be looked at: one fabric whose metrics are read, and are not, in turns.

It is one, since two processes of one program differ by more than what is measured here.
"""

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
TITLE = "Metrics: the daemons' CPU a token while both are scraped, and while they are not"
_SUBJECT: Final = "zfabric scraped"
_LEFT_ALONE, _SCRAPED = "left alone", "scraped"
#: A turn is shorter, so each has one scrape: twenty times as often as a usual scraper comes.
_INTERVAL_S: Final = 1.0
_ACCEPT: Final = "application/openmetrics-text; version=1.0.0"
#: How many times the CPU of a turn without scrapes they may take.
_GOAL: Final = 1.02
#: Short turns, many of them: what disturbs one of them disturbs the next as well, more often than not.
_TURN_S: Final = 0.7
_ROUNDS: Final = (25, 60)
#: By name: streams at a time, and tokens of each.
_LOADS: Final = {"streams": (64, 128), "one_token": (16, 1)}


async def run(bench: Bench, report: Report) -> None:
    """Each lane asks for an answer, and again; the engine has no compute."""
    (stack,) = (await bench.stacks(report, [_SUBJECT])).values() or (None,)
    if stack is None:
        return
    rows: list[list[str]] = []
    for load, (streams, tokens) in _LOADS.items():
        found = await bench.in_turn(
            report,
            {_LEFT_ALONE: stack, _SCRAPED: stack},
            "flood",
            rounds=_ROUNDS[0] if bench.quick else _ROUNDS[1],
            during={_SCRAPED: partial(_scraped, stack.pages)},
            concurrency=streams,
            tokens=tokens,
            seconds=_TURN_S,
        )
        if len(found) < 2:
            continue
        alone, scraped = found[_LEFT_ALONE], found[_SCRAPED]
        report.metric(
            f"{load}.cpu_ratio",
            ratios(list(map(_daemons_us, scraped)), list(map(_daemons_us, alone))),
            "×",
            "lower",
            goal=_GOAL,
            reference=_LEFT_ALONE,
        )
        rates = ([outcome.rate for outcome in outcomes] for outcomes in (scraped, alone))
        report.metric(f"{load}.rate_ratio", ratios(*rates), "×", "higher")
        for name, outcomes in found.items():
            rate = percentile([outcome.rate * tokens for outcome in outcomes], 50)
            cpu = [percentile([outcome.cpu_us(role) / tokens for outcome in outcomes], 50) for role in (HOP, WORKER)]
            rows.append([load, name, f"{rate:,.0f}", *(f"{cost:.2f}" for cost in cpu)])
    columns = ["load", "turns", "tokens/s", "controller", "worker"]
    report.tables.append(
        Table(f"A scrape of each daemon in turns of {_TURN_S:g} s; median CPU in µs a token", columns, rows)
    )
    report.unequal.append("What is counted is counted in both kinds of turns, and both measure their loops' lag.")


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
