"""What flight recordings cost: the same system with and without them, at the controller and at the worker."""

from __future__ import annotations

from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.subjects import HOP, WORKER

NAME = "recording"
TITLE = "Recording: what happens to each request is kept"
_TOKENS = 128
_PAIR = ("zfabric", "zfabric recorded")


async def run(bench: Bench, report: Report) -> None:
    """One-token requests at rest, the same 64 at a time, and 64 streams."""
    stacks = await bench.stacks(report, _PAIR)
    if len(stacks) < 2:
        return
    rest = await bench.in_turn(report, stacks, "closed", seconds=bench.seconds(1.0), requests=20_000)
    short = await bench.in_turn(report, stacks, "flood", concurrency=64, tokens=1, seconds=bench.seconds(1.0))
    many = await bench.in_turn(report, stacks, "flood", concurrency=64, tokens=_TOKENS, seconds=bench.seconds(1.0))
    if min(len(rest), len(short), len(many)) < 2:
        return
    medians = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
    requests = {name: [outcome.rate for outcome in found] for name, found in short.items()}
    tokens = {name: [outcome.rate * _TOKENS for outcome in found] for name, found in many.items()}
    plain, recorded = _PAIR
    whole = {
        name: [sum(outcome.cpu_us(role) for role in outcome.cpu_s) for outcome in found] for name, found in rest.items()
    }
    cpu = ratios(whole[recorded], whole[plain])
    report.metric("cpu_ratio", cpu, "×", "lower", goal=1.05, reference="no recording; all three ends")
    report.metric("p50_ratio", ratios(medians[recorded], medians[plain]), "×", "lower", reference="no recording")
    for name, rates in (("requests_ratio", requests), ("tokens_ratio", tokens)):
        found = ratios(rates[recorded], rates[plain])
        report.metric(name, found, "×", "higher", reference="no recording")
    rows = []
    for name in _PAIR:
        hop, worker = (
            sum(outcome.cpu_us(role) for outcome in short[name]) / len(short[name]) for role in (HOP, WORKER)
        )
        figures = (percentile(medians[name], 50), percentile(requests[name], 50), percentile(tokens[name], 50))
        rows.append([name, *(f"{figure:,.0f}" for figure in figures), f"{hop:.1f}", f"{worker:.1f}"])
    columns = [
        "system",
        "one token p50 µs",
        "requests/s",
        "64 streams tokens/s",
        "controller µs a request",
        "worker µs",
    ]
    report.tables.append(Table(TITLE, columns, rows))
