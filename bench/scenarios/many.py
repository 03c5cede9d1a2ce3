"""Thousands of streams of one client, as a gateway or a trainer has them: the shape that vLLM's Rust front end is measured in."""

from __future__ import annotations

from statistics import median

from bench.record import Report, Table
from bench.runner import Bench
from bench.subjects import HOP, WORKER

NAME = "many"
TITLE = "1,024 and 2,048 streams of 512 tokens: tokens a second, and CPU of each process"
_SUBJECTS = ("zfabric", "zfabric reader")
_STREAMS = (1_024, 2_048)
_WORDS, _TOKENS = 32, 512
#: What is said of vLLM's Rust front end with a mock engine, on a host with many more and faster cores than a desk has.
_PUBLIC = "2.06 M tokens/s on a GB200 host"


async def run(bench: Bench, report: Report) -> None:
    """All streams begin at once, and the time runs until the last has ended; the engine has no compute, and hands over one token
    of each stream a step."""
    stacks = await bench.stacks(report, _SUBJECTS)
    rows: list[list[str]] = []
    for streams in _STREAMS:
        found = await bench.in_turn(
            report, stacks, "streams", streams=streams, tokens=_TOKENS, words=_WORDS, limit_s=60
        )
        for name, outcomes in found.items():
            rates = [outcome.rate for outcome in outcomes]
            report.metric(f"{name.replace(' ', '_')}.tokens_per_second_at_{streams}", rates, "1/s", "higher")
            costs = [f"{median(outcome.cpu_us(role) for outcome in outcomes):.2f}" for role in (HOP, WORKER, "client")]
            spread = f"{median(rates):,.0f} ({min(rates):,.0f} – {max(rates):,.0f})"
            rows.append([name, f"{streams:,}", spread, *costs])
    columns = ["system", "streams", "tokens/s: median (least – most)", "controller", "worker", "client"]
    report.tables.append(Table(f"{_WORDS} tokens in, {_TOKENS} out; CPU in µs a token", columns, rows))
    report.unequal.append(
        f"The public figure of vLLM's Rust front end in this shape is {_PUBLIC}; it is another machine's."
    )
