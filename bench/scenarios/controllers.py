"""What a second and a third controller cost, of which each worker has a session with all and a client is at one."""

from __future__ import annotations

import contextlib

from bench import subjects
from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.stack import Outcome

NAME = "controllers"
TITLE = "Controllers: one, two and three of them"
_SYSTEMS = {
    "zfabric": subjects.fabric,
    "zfabric of two": subjects.fabric_of_two,
    "zfabric of three": subjects.fabric_of_three,
}
_STREAMS, _RATE = 256, 50
_TOKENS = 100


async def run(bench: Bench, report: Report) -> None:
    """CPU of all processes together: a token of 256 paced streams, and a request of one token."""
    async with contextlib.AsyncExitStack() as running:
        paced = {name: await running.enter_async_context(make(_RATE)) for name, make in _SYSTEMS.items()}
        tokens = await bench.in_turn(
            report,
            paced,
            "paced",
            rounds=3 if bench.quick else 7,
            streams=_STREAMS,
            tokens=_TOKENS,
            tokens_per_second=_RATE,
        )
    async with contextlib.AsyncExitStack() as running:
        fast = {name: await running.enter_async_context(make(0)) for name, make in _SYSTEMS.items()}
        rest = await bench.in_turn(report, fast, "closed", seconds=bench.seconds(1.0), requests=20_000)
        many = await bench.in_turn(report, fast, "flood", concurrency=64, tokens=1, seconds=bench.seconds(1.0))
    if min(len(tokens), len(rest), len(many)) < len(_SYSTEMS):
        return
    token_us, request_us = ({name: _whole(outcomes) for name, outcomes in found.items()} for found in (tokens, many))
    at_rest = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
    rates = {name: [outcome.rate for outcome in found] for name, found in many.items()}
    rows = []
    for name in _SYSTEMS:
        key, alone = name.replace(" ", "_"), "one controller"
        if name != "zfabric":
            found = ratios(token_us[name], token_us["zfabric"])
            report.metric(f"{key}.token_cpu_ratio", found, "×", "lower", reference=alone)
            found = ratios(request_us[name], request_us["zfabric"])
            report.metric(f"{key}.request_cpu_ratio", found, "×", "lower", reference=alone)
        figures = (at_rest[name], rates[name], request_us[name], token_us[name])
        rows.append([name, *(f"{percentile(values, 50):,.1f}" for values in figures)])
    columns = ["system", "one token p50 µs", "64 at a time: requests/s", "CPU µs a request", "CPU µs a paced token"]
    report.tables.append(Table(TITLE, columns, rows))


def _whole(outcomes: list[Outcome]) -> list[float]:
    return [sum(outcome.cpu_us(role) for role in outcome.cpu_s) for outcome in outcomes]
