"""Dispatch policies on a trace: how long it takes, who waits, and how unequal the workers' loads are."""

from __future__ import annotations

from pathlib import Path

from bench.balance import Outcome, lower_bound_s, play, service_s
from bench.record import Report, Table
from bench.runner import Bench
from bench.traces import SHIPPED, Arrival, read
from zfabric.core.controller.dispatch import POLICIES

NAME = "balance"
TITLE = "Balance: policies on heavy-tailed requests and unequal workers"
#: Relative speeds: two generations of machines, and one that limps.
_SPEEDS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.25)
_SLOTS_EACH = 8
_LOAD = 0.9
_REQUESTS_MAX = 4_000


def scaled(trace: list[Arrival]) -> list[Arrival]:
    """The same requests, their gaps stretched so that the cluster is loaded to nine tenths."""
    picked = trace[:_REQUESTS_MAX]
    work_s = sum(service_s(arrival, 1.0) for arrival in picked) / (sum(_SPEEDS) * _SLOTS_EACH)
    factor = work_s / _LOAD / max(picked[-1].at_s, 1e-9)
    return [Arrival(arrival.at_s * factor, arrival.prompt_tokens, arrival.answer_tokens) for arrival in picked]


async def run(bench: Bench, report: Report) -> None:
    """Each policy with requests waiting in the controller, and two of them as FastChat has them wait, at workers."""
    for path in bench.traces or [str(SHIPPED)]:
        _one(bench, report, Path(path))


def _one(bench: Bench, report: Report, path: Path) -> None:
    trace = scaled(read(path))
    bound = lower_bound_s(trace, _SPEEDS)
    rows = []
    cases = [(policy, True) for policy in sorted(POLICIES)] + [("lottery", False), ("shortest_queue", False)]
    for policy, central in cases:
        bench.say(f"{path.name} · {policy}")
        found = [play(trace, _SPEEDS, policy, central=central, seed=seed) for seed in range(bench.rounds)]
        label = policy if central else f"{policy} at arrival"
        name = f"{path.stem}.{label.replace(' ', '_')}"
        report.metric(f"{name}.makespan_ratio", [o.makespan_s / bound for o in found], "×", "lower", reference="bound")
        report.metric(f"{name}.wait_p99_s", [o.wait_p99_s for o in found], "s", "lower")
        rows.append([label, *_figures(found, bound)])
    columns = ["policy", "makespan / bound", "wait p50 s", "wait p99 s", "spread of load"]
    title = f"{path.name}: {len(trace):,} requests, {len(_SPEEDS)} workers of {_SLOTS_EACH} slots, load {_LOAD:.0%}"
    report.tables.append(Table(title, columns, rows))
    if path == SHIPPED:
        report.unequal.append(
            "The bound is below the best schedule that knows the whole trace, so no policy can be at 1. A simulation: "
            "prefill 8,000 tokens/s, 50 tokens/s a stream, at speed 1."
        )


def _figures(found: list[Outcome], bound: float) -> list[str]:
    count = len(found)
    means = (
        sum(outcome.makespan_s for outcome in found) / count / bound,
        sum(outcome.wait_p50_s for outcome in found) / count,
        sum(outcome.wait_p99_s for outcome in found) / count,
        sum(outcome.spread for outcome in found) / count,
    )
    return [f"{mean:.2f}" for mean in means]
