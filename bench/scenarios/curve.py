"""What keys cost: the same system with and without them."""

from __future__ import annotations

from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.stack import Outcome
from bench.subjects import HOP

NAME = "curve"
TITLE = "CURVE: every connection encrypted and known"
_TOKENS = 128
_PAIR = ("zfabric", "zfabric curve")


async def run(bench: Bench, report: Report) -> None:
    """One-token requests at rest, the same 64 at a time, and 64 streams."""
    stacks = await bench.stacks(report, _PAIR)
    if len(stacks) < 2:
        return
    seconds = bench.seconds(0.5)
    rest = await bench.in_turn(report, stacks, "closed", seconds=seconds, requests=20_000)
    short = await bench.in_turn(report, stacks, "flood", concurrency=64, tokens=1, seconds=seconds)
    many = await bench.in_turn(report, stacks, "flood", concurrency=64, tokens=_TOKENS, seconds=seconds)
    if min(len(rest), len(short), len(many)) < 2:
        return
    medians = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
    requests = {name: [outcome.rate for outcome in found] for name, found in short.items()}
    tokens = {name: [outcome.rate * _TOKENS for outcome in found] for name, found in many.items()}
    #: Of all three ends.
    request_cpu = {name: [_cpu_us(outcome) for outcome in found] for name, found in short.items()}
    token_cpu = {name: [_cpu_us(outcome) / _TOKENS for outcome in found] for name, found in many.items()}
    plain, guarded = _PAIR
    report.metric("p50_ratio", ratios(medians[guarded], medians[plain]), "×", "lower", goal=1.15, reference="no keys")
    report.metric("requests_ratio", ratios(requests[guarded], requests[plain]), "×", "higher", reference="no keys")
    report.metric("rate_ratio", ratios(tokens[guarded], tokens[plain]), "×", "higher", reference="no keys")
    for name, spent in (("request_cpu_ratio", request_cpu), ("token_cpu_ratio", token_cpu)):
        report.metric(name, ratios(spent[guarded], spent[plain]), "×", "lower", reference="no keys; all three ends")
    rows = []
    for name in _PAIR:
        figures = [percentile(found[name], 50) for found in (medians, requests, tokens)]
        hop = percentile([outcome.cpu_us(HOP) / _TOKENS for outcome in many[name]], 50)
        cpu = (percentile(request_cpu[name], 50), percentile(token_cpu[name], 50), hop)
        rows.append([name, *(f"{figure:,.0f}" for figure in figures), *(f"{spent:,.2f}" for spent in cpu)])
    columns = [
        "system",
        "one token p50 µs",
        "requests/s, one token",
        "64 streams tokens/s",
        "CPU a request µs",
        "CPU a token µs",
        "of it the controller",
    ]
    report.tables.append(Table(TITLE, columns, rows))


def _cpu_us(outcome: Outcome) -> float:
    return sum(outcome.cpu_us(role) for role in outcome.cpu_s)
