"""From a request to its first token: at rest and under load, beside everything else; and what long prompts cost."""

from __future__ import annotations

from bench.record import Plot, Report, Table
from bench.runner import COMPARED, Bench, percentile, ratios
from bench.stack import Outcome, Stack
from bench.subjects import HOP

NAME = "one-token"
TITLE = "One token: request to first token"
#: Share of its own capacity at which a system is loaded.
_LOAD = 0.8
_ROUTERS = ("vllm-router", "sglang-router", "smg")
_PROMPTS = {"1 KB": 1_024, "32 KB": 32_768, "1 MB": 1_048_576}


Samples = dict[str, list[float]]


async def run(bench: Bench, report: Report) -> None:
    """At rest one request after another; under load random arrivals, timed from when they were due."""
    stacks = await bench.stacks(report, [*COMPARED, "zfabric ipc", *bench.beside, "zmq_proxy"])
    rest = await bench.in_turn(report, stacks, "closed", seconds=bench.seconds(0.5), requests=20_000)
    medians = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
    loaded, alike = await _under_load(bench, report, stacks)
    _goals(report, medians)
    if "zfabric" in rest:
        whole = [sum(outcome.cpu_us(role) for role in outcome.cpu_s) for outcome in rest["zfabric"]]
        report.metric("zfabric.cpu_us_all", whole, "µs", "lower", goal=120, reference="controller, worker and client")
    rows = []
    for name, outcomes in rest.items():
        at_rest = [sample for outcome in outcomes for sample in outcome.samples]
        busy, equal = loaded.get(name, []), alike.get(name, [])
        hop = sum(outcome.cpu_us(HOP) for outcome in outcomes) / len(outcomes)
        figures = [*(percentile(at_rest, q) for q in (50, 99, 99.9)), *(percentile(busy, q) for q in (50, 99, 99.9))]
        figures += [percentile(equal, q) for q in (50, 99)]
        rows.append([name, *(f"{figure:,.0f}" for figure in figures), f"{hop:,.0f}"])
        report.metric(f"{name.replace(' ', '_')}.p50_us", medians[name], "µs", "lower")
    columns = ["system", "p50", "p99", "p99.9", "p50 at 80 %", "p99", "p99.9", "p50 alike", "p99", "hop CPU"]
    title = "Time to first token, µs: at rest, at 80 % of each system's own capacity, and at one rate for all"
    report.tables.append(Table(title, columns, rows))
    samples = {name: sorted(s for outcome in found for s in outcome.samples) for name, found in rest.items()}
    for title, found in (("at rest", samples), ("at 80 % load", {n: sorted(s) for n, s in loaded.items()})):
        lines = {
            name: [(float(i), value) for i, value in enumerate(values)] for name, values in found.items() if values
        }
        report.plots.append(Plot(f"Time to first token {title}", "percentile", "µs", _thin(lines), "distribution"))
    await _prompts(bench, report)
    report.unequal += [
        "zfabric, zmq_proxy, NATS and the routers have a hop in between; http and gRPC are direct connections.",
        "HTTP systems parse JSON and server-sent events, the others MessagePack: that is what each is.",
        "80 % is of each system's own capacity with 16 requests at a time, so the rates differ. Arrivals that come alone "
        "cost more than 16 at once, most so where messages are merged, so the load is nearer to saturation than it says.",
        "The one rate is 80 % of the slowest system's capacity.",
    ]


async def _under_load(bench: Bench, report: Report, stacks: dict[str, Stack]) -> tuple[Samples, Samples]:
    """Samples at 80 % of each system's own capacity, and at a rate that all of them can serve."""
    capacity = await bench.in_turn(
        report,
        stacks,
        "flood",
        rounds=1,
        concurrency=16,
        seconds=bench.seconds(0.3),
    )
    rates = {name: {"rate": max(1.0, found[0].rate * _LOAD)} for name, found in capacity.items()}
    known = {name: stack for name, stack in stacks.items() if name in rates}
    least = {"rate": min((rate["rate"] for rate in rates.values()), default=1.0)}
    loaded: list[Samples] = []
    for each in (rates, dict.fromkeys(rates, least)):
        found = await bench.in_turn(report, known, "open", rounds=1, each=each, seconds=bench.seconds(0.7))
        loaded.append({name: [s for outcome in outcomes for s in outcome.samples] for name, outcomes in found.items()})
    return loaded[0], loaded[1]


def _goals(report: Report, medians: dict[str, list[float]]) -> None:
    if "zfabric" not in medians:
        return
    own = medians["zfabric"]
    for name, goal in (("zmq_proxy", 1.0), ("fastchat", 0.1), ("nats", 0.8)):
        if name in medians:
            report.metric(f"p50_ratio_{name}", ratios(own, medians[name]), "×", "lower", goal=goal, reference=name)
    for name in (*_ROUTERS, "grpc"):
        if name in medians:
            goal_of = 0.4 if name in _ROUTERS else None
            report.metric(f"p50_ratio_{name}", ratios(own, medians[name]), "×", "lower", goal=goal_of, reference=name)


async def _prompts(bench: Bench, report: Report) -> None:
    """Bodies are opaque to the controller: what does a long one cost it? And what does it cost libzmq and the kernel?"""
    stacks = await bench.stacks(report, ["zfabric", "zmq_proxy"])
    costs: dict[str, dict[str, list[float]]] = {name: {} for name in stacks}
    for label, size in _PROMPTS.items():
        count = 300 if size < 100_000 else 40
        found: dict[str, list[Outcome]] = await bench.in_turn(
            report, stacks, "closed", requests=count, prompt_bytes=size, rounds=bench.rounds
        )
        for name, outcomes in found.items():
            costs[name][label] = [outcome.cpu_us(HOP) for outcome in outcomes]
    whole = {name: cost for name, cost in costs.items() if len(cost) == len(_PROMPTS)}
    for name, cost in whole.items():
        key = "controller" if name == "zfabric" else name
        growth = ratios(cost["1 MB"], cost["1 KB"])
        report.metric(f"{key}_cpu_ratio_1mb_1kb", growth, "×", "lower", reference="1 KB")
        report.metric(f"{key}_cpu_ratio_32kb_1kb", ratios(cost["32 KB"], cost["1 KB"]), "×", "lower")
    if {"zfabric", "zmq_proxy"} <= whole.keys():
        against = ratios(whole["zfabric"]["1 MB"], whole["zmq_proxy"]["1 MB"])
        report.metric("controller_cpu_ratio_1mb", against, "×", "lower", goal=1.0, reference="zmq_proxy")
    rows = [[label, *(f"{percentile(cost[label], 50):,.0f}" for cost in whole.values())] for label in _PROMPTS]
    report.tables.append(Table("The hop's CPU per request by prompt, all threads, µs", ["prompt", *whole], rows))


def _thin(lines: dict[str, list[tuple[float, float]]], points: int = 400) -> dict[str, list[tuple[float, float]]]:
    """As percentiles, few enough to draw, the tail kept."""
    thinned = {}
    for name, line in lines.items():
        last = len(line) - 1
        picked = {round(last * (1 - 10 ** (-4 * step / points))) for step in range(points)} | {last}
        thinned[name] = [(100 * (position + 0.5) / len(line), line[position][1]) for position in sorted(picked)]
    return thinned
