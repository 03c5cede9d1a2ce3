"""As a GPU does it: 256 streams at 50 tokens a second each, all stepping together. What everybody spends, and the jitter."""

from __future__ import annotations

import contextlib

from bench import subjects
from bench.record import Report, Table
from bench.runner import Bench, percentile
from bench.stack import Outcome, Stack, StackError
from bench.subjects import HOP, WORKER
from bench.venvs import PeerMissingError

NAME = "paced"
TITLE = "Paced: 256 streams at 50 tokens/s each"
_STREAMS, _RATE = 256, 50
_SYSTEMS = {
    "zfabric": subjects.fabric,
    "vllm-router": subjects.vllm_router,
    "sglang-router": subjects.sglang_router,
    "smg": subjects.smg,
    "http": subjects.http,
    "grpc": subjects.grpc,
    "nats": subjects.nats,
}


async def run(bench: Bench, report: Report) -> None:
    """Jitter is how far a gap between two tokens of a stream is from the engine's interval."""
    rounds = 2 if bench.quick else 4
    outcomes: dict[str, list[Outcome]] = {}
    async with contextlib.AsyncExitStack() as running:
        stacks: dict[str, Stack] = {}
        for name, make in _SYSTEMS.items():
            if bench.only and name not in bench.only:
                continue
            bench.say(f"starting {name}, paced")
            try:
                stacks[name] = await running.enter_async_context(make(_RATE))
            except (PeerMissingError, StackError) as error:
                report.skipped.append(f"{name}: {error}")
        tokens = 50 if bench.quick else 250
        outcomes = await bench.in_turn(
            report, stacks, "paced", rounds=rounds, streams=_STREAMS, tokens=tokens, tokens_per_second=_RATE
        )
    rows = []
    for name, found in outcomes.items():
        jitter = [percentile(outcome.samples, 99) / 1e3 for outcome in found]
        firsts = [percentile(outcome.firsts, 50) / 1e3 for outcome in found]
        cpu = {role: [outcome.cpu_us(role) for outcome in found] for role in (HOP, WORKER, "client")}
        goal, reference = (6, "Rust routers 21–26") if name == "zfabric" else (None, "")
        key = name.replace(" ", "_")
        report.metric(f"{key}.jitter_p99_ms", jitter, "ms", "lower")
        if HOP in found[0].cpu_s:
            report.metric(f"{key}.hop_cpu_per_token_us", cpu[HOP], "µs", "lower", goal=goal, reference=reference)
        figures = [percentile(jitter, 50), percentile(firsts, 50), *(percentile(cpu[role], 50) for role in cpu)]
        rows.append([name, *(f"{figure:.2f}" for figure in figures)])
    columns = ["system", "jitter p99 ms", "first token p50 ms", "hop CPU µs/token", "worker", "client"]
    report.tables.append(Table(TITLE, columns, rows))
    report.unequal.append("The first token waits for the engine's next step, up to 20 ms, in every system.")
