"""Tokens end to end: as fast as it goes, from 1 to 1,024 streams at once."""

from __future__ import annotations

from bench.record import Plot, Report, Table
from bench.runner import COMPARED, Bench, percentile, ratios
from bench.subjects import HOP, WORKER

NAME = "streams"
TITLE = "Streams: tokens a second end to end"
_STREAMS = (1, 16, 64, 256, 1_024)
#: Of an answer; shorter ones where there are many, or the slow systems would take minutes.
_TOKENS = {1: 128, 16: 128, 64: 128, 256: 32, 1_024: 16}
#: Times zfabric's rate at 64 streams has to be of theirs.
_GOALS = {"fastchat": 100, "vllm-router": 8, "sglang-router": 8, "smg": 8, "grpc": 20}
#: Tokens a second, whatever the machine.
_RATE_GOALS = {64: 1_000_000, 256: 1_000_000}


async def run(bench: Bench, report: Report) -> None:
    """Each lane asks for an answer, and again; the engine has no compute and hands over a token a step."""
    stacks = await bench.stacks(report, [*COMPARED, "zfabric reader", "zfabric asyncio", *bench.beside])
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in stacks}
    rows: dict[str, list[str]] = {name: [name] for name in stacks}
    costs: list[list[str]] = []
    for count in _STREAMS:
        tokens = _TOKENS[count]
        found = await bench.in_turn(
            report, stacks, "flood", concurrency=count, tokens=tokens, seconds=bench.seconds(0.3), rounds=2
        )
        own = [outcome.rate * tokens for outcome in found.get("zfabric", [])]
        for name, outcomes in found.items():
            values = [outcome.rate * tokens for outcome in outcomes]
            rates[name].append((count, sum(values) / len(values)))
            rows[name].append(f"{rates[name][-1][1]:,.0f}")
            if count == 64:
                cpu = [f"{outcomes[-1].cpu_us(role) / tokens:.2f}" for role in (HOP, WORKER, "client")]
                wire = [outcome.wire_bytes / outcome.count / tokens for outcome in outcomes]
                costs.append([name, *cpu, f"{percentile(wire, 50):.0f}"])
                report.metric(f"{name.replace(' ', '_')}.wire_bytes_per_token", wire, "bytes", "lower")
                if name in _GOALS and own:
                    report.metric(
                        f"rate_ratio_{name}_at_64",
                        ratios(own, values),
                        "×",
                        "higher",
                        goal=_GOALS[name],
                        reference=name,
                    )
        for name in stacks.keys() - found.keys():
            rows[name].append("failed")
        goal = _RATE_GOALS.get(count)
        if own:
            report.metric(f"tokens_per_second_at_{count}", own, "1/s", "higher", goal=goal, reference="this machine")
        if read := [outcome.rate * tokens for outcome in found.get("zfabric reader", [])]:
            name = f"reader.tokens_per_second_at_{count}"
            report.metric(name, read, "1/s", "higher", goal=goal, reference="this machine")
    columns = ["system", *(f"{count:,} streams" for count in _STREAMS)]
    report.tables.append(Table("Tokens a second", columns, list(rows.values())))
    columns = ["system", "hop", "worker", "client", "bytes on the wire"]
    report.tables.append(
        Table("A token at 64 streams: CPU in µs, and bytes on the loopback, all hops and headers", columns, costs)
    )
    report.plots.append(Plot(TITLE, "streams", "tokens/s", {name: line for name, line in rates.items() if line}))
    report.unequal += [
        "zfabric puts all tokens that an engine's step has for one client into one message; every reader still gets each "
        "token as a delta of its own. The other systems have no such message.",
        "FastChat's protocol repeats the whole text with every token.",
    ]
