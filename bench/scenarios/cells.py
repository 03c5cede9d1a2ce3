"""Cells: what a controller between the controller and the worker costs, and a hundred of them with a thousand workers each."""

from __future__ import annotations

import gc
import tracemalloc
from statistics import median

import psutil

from bench.cells import Cells, broker_of, flat_us
from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.scenarios.relay import flood, flooded
from bench.subjects import CELL, HOP, WORKER

NAME = "cells"
TITLE = "Cells: a controller below a controller"
_CELLS, _WORKERS = 100, 1_000
_STREAMS, _TOKENS = 64, 128


async def run(bench: Bench, report: Report) -> None:
    """One request and its tokens through one controller and through two, in turn; then many workers in the cores alone."""
    await _hop(bench, report)
    await _messages(bench, report)
    _many(bench, report)
    report.unequal.append(
        "The hundred cells are cores in one process: no sockets, no engines, and workers that only say that they exist. What the "
        "kernel and the sockets take comes on top, as it does for one controller."
    )


async def _hop(bench: Bench, report: Report) -> None:
    stacks = await bench.stacks(report, ["zfabric", "zfabric cell"])
    rest = await bench.in_turn(report, stacks, "closed", seconds=bench.seconds(0.5), requests=20_000)
    busy = await bench.in_turn(
        report, stacks, "flood", concurrency=_STREAMS, tokens=_TOKENS, seconds=bench.seconds(0.5)
    )
    rows = []
    for name in rest.keys() & busy.keys():
        p50 = [percentile(outcome.samples, 50) for outcome in rest[name]]
        rate = [outcome.rate * _TOKENS for outcome in busy[name]]
        cpu = [f"{median([o.cpu_us(role) for o in rest[name]]):.0f}" for role in (HOP, CELL, WORKER)]
        tokens = [f"{median([o.cpu_us(role) / _TOKENS for o in busy[name]]):.2f}" for role in (HOP, CELL, WORKER)]
        rows.append([name, f"{median(p50):.0f}", *cpu, f"{median(rate):,.0f}", *tokens])
    if len(rows) == 2:
        first = {name: [percentile(outcome.samples, 50) for outcome in found] for name, found in rest.items()}
        rates = {name: [outcome.rate for outcome in found] for name, found in busy.items()}
        report.metric(
            "cell.request_p50_ratio", ratios(first["zfabric cell"], first["zfabric"]), "×", "lower", reference="direct"
        )
        report.metric(
            "cell.token_rate_ratio", ratios(rates["zfabric cell"], rates["zfabric"]), "×", "higher", reference="direct"
        )
        report.metric("cell.request_p50_us", first["zfabric cell"], "µs", "lower")
    columns = ["system", "p50 µs", "hop", "cell", "worker", f"tokens/s at {_STREAMS}", "hop", "cell", "worker"]
    title = "Request to first token with CPU µs of each request, and tokens a second with CPU µs of each token"
    report.tables.append(Table(title, columns, sorted(rows)))


async def _messages(bench: Bench, report: Report) -> None:
    """The worst case: each token in a message of its own."""
    count = 128 * (400 if bench.quick else 2_000)
    costs: dict[str, list[float]] = {"direct": [], "parent": [], "cell": []}
    async with flooded("fabric") as direct, flooded("cell") as cell:
        for turn in range(bench.rounds + 1):
            found = [await flood(direct, count), await flood(cell, count), await flood(cell, count, role=CELL)]
            for name, (_, cost) in zip(costs, found, strict=True) if turn else ():
                costs[name].append(cost)
    report.metric("cell.controller_cpu_per_message_us", costs["cell"], "µs", "lower")
    report.metric(
        "cell.cpu_per_message_ratio", ratios(costs["cell"], costs["direct"]), "×", "lower", reference="one controller"
    )
    rows = [[name, f"{median(values):.2f}", f"{min(values):.2f} … {max(values):.2f}"] for name, values in costs.items()]
    report.tables.append(
        Table("CPU of a controller for one message of one token, µs", ["controller", "µs", "spread"], rows)
    )


def _many(bench: Bench, report: Report) -> None:
    rows = []
    for workers in (_WORKERS, 16_000):
        bench.say(f"one controller · {workers:,} workers")
        broker = broker_of(workers, 1, 1)
        spent = [flat_us(broker, 2_000, first=turn * 2_000) for turn in range(bench.rounds)]
        rows.append([f"one controller, {workers:,} workers", _spread(spent), "–", "–"])
        del broker
    for cells in (1, _CELLS):
        bench.say(f"{cells} cells of {_WORKERS:,} workers")
        gc.collect()
        before = psutil.Process().memory_info().rss
        made = Cells(cells, _WORKERS)
        held = psutil.Process().memory_info().rss - before
        # A hundred controllers' objects are no one controller's to look through.
        gc.freeze()
        # A controller puts its many hosts in order at the first request that asks for them.
        made.request_costs(1_000)
        costs = [made.request_costs(2_000, first=(turn + 1) * 2_000) for turn in range(bench.rounds)]
        parent, cell, chunk = ([getattr(cost, name) for cost in costs] for name in ("parent", "cell", "chunk"))
        rows.append([f"{cells} cells, {cells * _WORKERS:,} workers", _spread(parent), _spread(cell), _spread(chunk)])
        if cells == _CELLS:
            report.metric("cells_100.parent_request_us", parent, "µs", "lower", reference="core, whole request")
            report.metric("cells_100.cell_request_us", cell, "µs", "lower", reference="core, whole request")
            report.metric("cells_100.cell_chunks_us", chunk, "µs", "lower", reference="core")
            report.metric("cells_100.memory_mib", [held / 2**20], "MiB", "lower")
            _announcements(bench, report, made)
        del made
        gc.unfreeze()
    columns = ["", "parent", "cell", "message of chunks in the cell"]
    report.tables.append(Table("One request in the cores, CPU µs: median (least … most)", columns, rows))
    _memory(report)


def _announcements(bench: Bench, report: Report, made: Cells) -> None:
    rows = []
    for name, measure in (("a worker comes", made.announcement_us), ("another load", made.load_us)):
        found = [measure(number % _CELLS) for number in range(bench.rounds * 10)]
        told, heard = [cell for cell, _ in found], [parent for _, parent in found]
        rows.append([name, _spread(told), _spread(heard)])
        key = name.replace(" ", "_")
        report.metric(f"cells_100.{key}.cell_us", told, "µs", "lower")
        report.metric(f"cells_100.{key}.parent_us", heard, "µs", "lower")
    title = f"What {_WORKERS:,} workers together are, added up and told, CPU µs: median (least … most)"
    report.tables.append(Table(title, ["", "cell", "parent"], rows))


def _memory(report: Report) -> None:
    """What one worker takes at its cell, by what Python has allocated."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    broker = broker_of(_WORKERS, 1, 1)
    own = (tracemalloc.get_traced_memory()[0] - before) / len(broker.registry.workers)
    tracemalloc.stop()
    report.metric("cells.memory_per_worker_bytes", [own], "bytes", "lower", reference="core of a cell")


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} … {max(values):.1f})"
