"""What encryption costs: the same system with and without keys."""

from __future__ import annotations

from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios

NAME = "curve"
TITLE = "CURVE: every connection encrypted and known"
_TOKENS = 128


async def run(bench: Bench, report: Report) -> None:
    """One-token requests at rest, and 64 streams."""
    stacks = await bench.stacks(report, ["zfabric", "zfabric curve"])
    if len(stacks) < 2:
        return
    rest = await bench.in_turn(report, stacks, "closed", seconds=bench.seconds(0.5), requests=20_000)
    many = await bench.in_turn(
        report, stacks, "flood", concurrency=64, tokens=_TOKENS, seconds=bench.seconds(0.5), rounds=bench.rounds
    )
    if len(rest) < 2 or len(many) < 2:
        return
    medians = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
    rates = {name: [outcome.rate * _TOKENS for outcome in found] for name, found in many.items()}
    p50 = ratios(medians["zfabric curve"], medians["zfabric"])
    report.metric("p50_ratio", p50, "×", "lower", goal=1.15, reference="no keys")
    report.metric("rate_ratio", ratios(rates["zfabric curve"], rates["zfabric"]), "×", "higher", reference="no keys")
    rows = [
        [name, f"{percentile(medians[name], 50):,.0f}", f"{percentile(rates[name], 50):,.0f}"]
        for name in ("zfabric", "zfabric curve")
    ]
    report.tables.append(Table(TITLE, ["system", "one token p50 µs", "64 streams tokens/s"], rows))
