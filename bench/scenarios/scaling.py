"""How many replicas: the controller's rule beside fixed numbers and an oracle, on traces of arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.record import Report, Table
from bench.runner import Bench
from bench.scaling import LATE_S, LOAD_S, Decide, Outcome, bursts, by_rule, fixed, oracle, play, slots_for
from bench.traces import SHIPPED, Arrival, read
from zfabric.core.controller.scaling import Rule, Signals

NAME = "scaling"
TITLE = "Scaling: the number of replicas by the load, in simulation"
_MOST = 32
_COLUMNS = ["replicas", "in time", "late p99 s", "GPU-hours", "of the oracle's", "most at a time"]


async def run(bench: Bench, report: Report) -> None:
    """Bursts with silence between, made of the shipped trace, and whatever traces are given."""
    _one(bench, report, "bursts", bursts(read(SHIPPED)), least=0)
    for path in bench.traces:
        try:
            arrivals = read(Path(path))
        except ValueError as error:
            report.skipped.append(str(error))
            continue
        _one(bench, report, Path(path).stem, arrivals, least=1)
    report.unequal.append(
        f"A simulation in the time of the trace: a replica loads for {LOAD_S:g} s, computes prompts one after the other, 8,000 "
        f"tokens a second, and decodes 50 tokens a second for each request. In time is a first token that comes no more than "
        f"{LATE_S:g} s later than on a replica that has nothing else."
    )


def _one(bench: Bench, report: Report, name: str, arrivals: Sequence[Arrival], *, least: int) -> None:
    bench.say(f"{name} · oracle")
    known = oracle(arrivals, least)
    best = play(arrivals, known, known(Signals(0, 0.0, 0, 0), 0.0))
    mean = max(1, round(best.gpu_hours * 3_600 / arrivals[-1].at_s))
    rows = [["oracle", *_figures(best, best)]]
    for label, (decide, initial) in _cases(mean, best.most, least).items():
        bench.say(f"{name} · {label}")
        outcome = play(arrivals, decide, initial)
        metric = f"{name}.{label.replace(', ', '_').replace(' = ', '_')}"
        report.metric(f"{metric}.in_time", [outcome.in_time], "×", "higher")
        report.metric(f"{metric}.gpu_hours", [outcome.gpu_hours / best.gpu_hours], "×", "lower", reference="oracle")
        rows.append([label, *_figures(outcome, best)])
    minutes, slots = arrivals[-1].at_s / 60, slots_for(arrivals)
    title = f"{name}: {len(arrivals):,} requests in {minutes:.0f} min, {slots} slots a replica"
    report.tables.append(Table(title, _COLUMNS, rows))


def _cases(mean: int, most: int, least: int) -> dict[str, tuple[Decide, int]]:
    """What is compared, by name, and replicas at the beginning of each."""
    found: dict[str, tuple[Decide, int]] = {}
    for number in sorted({mean, 2 * mean, most}):
        found[f"fixed, {number}"] = fixed(number), number
    for label, rule in (
        ("rule", Rule(model="m", min=least, max=_MOST)),
        ("rule, settle_s = 60", Rule(model="m", min=least, max=_MOST, settle_s=60, idle_s=60)),
        ("rule, busy = 0.5", Rule(model="m", min=least, max=_MOST, busy=0.5)),
    ):
        found[label] = by_rule(rule), max(least, 1)
    return found


def _figures(outcome: Outcome, best: Outcome) -> list[str]:
    return [
        f"{outcome.in_time:.1%}",
        f"{outcome.late_p99_s:.1f}",
        f"{outcome.gpu_hours:.2f}",
        f"{outcome.gpu_hours / best.gpu_hours:.2f}",
        str(outcome.most),
    ]
