"""Where prompts are cached: dispatch policies on prompts that share prefixes, and what the controller's index costs."""

from __future__ import annotations

import random
import time
from pathlib import Path

from bench.placement import Cluster, Outcome, Trace, conversations, one_cache, play, read
from bench.record import Report, Table
from bench.runner import Bench
from zfabric.core.controller.prefixes import PrefixIndex
from zfabric.limits import PREFIX_BLOCKS_MAX

NAME = "placement"
TITLE = "Placement: policies on prompts that share prefixes, in simulation"
#: A policy, and whether the index hears of what engines throw away.
_CASES = (
    ("round_robin", False),
    ("shortest_queue", False),
    ("most_cached", True),
    ("prefix_aware", False),
    ("prefix_aware", True),
)
_CHATS = Cluster(engines=8, cached_tokens=200_000)
_PUBLISHED = Cluster(engines=8, cached_tokens=500_000)
#: A large fleet, which gets published traces at ten times their speed; minutes of computing, so only in full runs.
_FLEET, _FLEET_SPEED = Cluster(engines=1_000, cached_tokens=500_000), 10
_INDEX_BLOCKS = 1_000_000
_LOOK_UPS = 2_000


async def run(bench: Bench, report: Report) -> None:
    """Each policy on generated chats, and on traces with the hashes of their prompts where such are given."""
    _one(bench, report, "conversations", conversations(1_000, rate=3.0), _CHATS)
    for path in bench.traces:
        try:
            trace = read(Path(path))
        except ValueError as error:
            report.skipped.append(str(error))
            continue
        _one(bench, report, Path(path).stem, trace, _PUBLISHED)
        if not bench.quick:
            _one(bench, report, f"{Path(path).stem}, ten times as fast", trace.faster(_FLEET_SPEED), _FLEET)
    bench.say("index")
    _index(report)
    report.unequal.append(
        "All but the index is a simulation in the time of the trace: an engine computes prompts one after the other, 8,000 "
        "tokens a second, and decodes 50 tokens a second for each of up to 64 requests, however many there are."
    )


def _one(bench: Bench, report: Report, name: str, trace: Trace, cluster: Cluster) -> None:
    bound = one_cache(trace, cluster)
    rows = [["one cache as large as all", f"{bound:.1%}", "100.0 %", "", "", ""]]
    for policy, told in _CASES:
        label = f"{policy}, told of evictions" if told else policy
        bench.say(f"{name} · {label}")
        outcome = play(trace, cluster, policy, told=told)
        metric = f"{name}.{policy}{'_told' if told else ''}"
        report.metric(f"{metric}.hit_ratio", [outcome.hit_rate / bound], "×", "higher", reference="one cache")
        report.metric(f"{metric}.ttft_p50_s", [outcome.ttft_p50_s], "s", "lower")
        report.metric(f"{metric}.ttft_p99_s", [outcome.ttft_p99_s], "s", "lower")
        rows.append([label, *_figures(outcome, bound)])
    columns = ["policy", "hit rate", "of one cache's", "TTFT p50 s", "TTFT p99 s", "most loaded / mean"]
    title = f"{name}: {len(trace.turns):,} requests, {cluster.engines} engines with {cluster.cached_tokens:,} cached tokens each"
    report.tables.append(Table(title, columns, rows))


def _figures(outcome: Outcome, bound: float) -> list[str]:
    return [
        f"{outcome.hit_rate:.1%}",
        f"{outcome.hit_rate / bound:.1%}",
        f"{outcome.ttft_p50_s:.2f}",
        f"{outcome.ttft_p99_s:.2f}",
        f"{outcome.spread:.2f}",
    ]


def _index(report: Report) -> None:
    """Look-ups of whole prompts in an index of a million blocks, a quarter of which everybody has."""
    rng, length = random.Random(1), PREFIX_BLOCKS_MAX
    rows = []
    for holders in (8, 1_000):
        index: PrefixIndex[int] = PrefixIndex()
        common = range(length // 4)
        prompts: list[list[int]] = []
        while len(index) < _INDEX_BLOCKS:
            start = length + len(prompts) * length
            prompts.append([*common, *range(start, start + length - len(common))])
            index.stored(len(prompts) % holders, prompts[-1])
        asked = [rng.choice(prompts) for _ in range(_LOOK_UPS)]
        began = time.perf_counter()
        for prompt in asked:
            index.matched(prompt)
        looked_us = (time.perf_counter() - began) / _LOOK_UPS * 1e6
        began = time.perf_counter()
        for number, prompt in enumerate(asked):
            index.stored(number % holders, prompt)
        stored_us = (time.perf_counter() - began) / _LOOK_UPS * 1e6
        report.metric(f"index.look_up_us.{holders}", [looked_us], "µs", "lower")
        report.metric(f"index.store_us.{holders}", [stored_us], "µs", "lower")
        rows.append([f"{holders:,}", f"{looked_us:.0f}", f"{stored_us:.0f}"])
    title = f"Index of {_INDEX_BLOCKS:,} blocks, prompts of {length} blocks"
    report.tables.append(Table(title, ["holders", "look-up µs", "store µs"], rows))
