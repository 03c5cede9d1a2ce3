"""OpenAI's API over HTTP: through zfabric's gateway, and through what routes to HTTP servers, with the same client for all."""

from __future__ import annotations

import contextlib

from bench import subjects
from bench.record import Report, Table
from bench.runner import Bench, percentile, ratios
from bench.stack import Outcome, Stack, StackError
from bench.subjects import CONTROLLER, HOP, WORKER
from bench.venvs import PeerMissingError

NAME = "gateway"
TITLE = "Gateway: OpenAI's API over HTTP"
_PEERS = ("vllm-router", "sglang-router", "smg", "litellm", "http")
_STREAMS = 64
#: Tokens of an answer, where tokens are what is counted.
_TOKENS = 128
#: Of each paced stream a second, and how many tokens that is.
_RATE, _PACED_TOKENS = 50, 50
#: What a token should cost the gateway, in µs. An event to a connection of its own is a system call, which alone took 3.6 where
#: it was tried: only fewer calls than tokens would meet this.
_GOAL_US = 4
_PACED = {
    "zfabric gateway": subjects.gateway,
    "vllm-router": subjects.vllm_router,
    "smg": subjects.smg,
    "litellm": subjects.litellm,
}


async def run(bench: Bench, report: Report) -> None:
    """One request at a time, then 64 lanes of one token, then of 128, then 64 streams at an engine's pace."""
    stacks = await bench.stacks(report, ["zfabric gateway", *_PEERS])
    rest = await bench.in_turn(report, stacks, "closed", seconds=bench.seconds(0.5), requests=20_000)
    short = await bench.in_turn(report, stacks, "flood", concurrency=_STREAMS, seconds=bench.seconds(0.5))
    long = await bench.in_turn(
        report, stacks, "flood", concurrency=_STREAMS, tokens=_TOKENS, seconds=bench.seconds(0.5)
    )
    rows = []
    for name in rest.keys() & short.keys() & long.keys():
        firsts = [percentile(outcome.samples, 50) for outcome in rest[name]]
        requests = [outcome.rate for outcome in short[name]]
        tokens = [outcome.rate * _TOKENS for outcome in long[name]]
        key = name.replace(" ", "_")
        report.metric(f"{key}.http_p50_us", firsts, "µs", "lower")
        report.metric(f"{key}.requests_per_second_at_64", requests, "1/s", "higher")
        report.metric(f"{key}.tokens_per_second_at_64", tokens, "1/s", "higher")
        cpu = [outcome.cpu_us(HOP) for outcome in short[name]] if HOP in short[name][0].cpu_s else []
        per_token = [outcome.cpu_us(HOP) / _TOKENS for outcome in long[name]] if cpu else []
        figures = [percentile(values, 50) for values in (firsts, requests, tokens, cpu)]
        rows.append([name, *(f"{figure:,.0f}" for figure in figures), f"{percentile(per_token, 50):.2f}"])
        if name != "zfabric gateway" and "zfabric gateway" in long:
            own = [outcome.rate * _TOKENS for outcome in long["zfabric gateway"]]
            report.metric(f"gateway_tokens_ratio_{name}_at_64", ratios(own, tokens), "×", "higher", reference=name)
    columns = ["system", "first token p50 µs", "requests/s at 64", "tokens/s at 64", "hop CPU µs/request", "µs/token"]
    report.tables.append(Table(TITLE, columns, sorted(rows)))
    await _at_a_pace(bench, report)
    report.unequal += [
        "Behind zfabric's gateway are its controller and worker; behind the routers an HTTP server in Python; http is that "
        "server alone.",
        "Without a pace tokens that wait together are one event through the gateway, and events of their own elsewhere.",
    ]


async def _at_a_pace(bench: Bench, report: Report) -> None:
    """Each token comes alone, as an engine's do, and is one event: what does it cost each process?"""
    async with contextlib.AsyncExitStack() as running:
        stacks: dict[str, Stack] = {}
        for name, make in _PACED.items():
            if bench.only and name not in bench.only:
                continue
            bench.say(f"starting {name}, paced")
            try:
                stacks[name] = await running.enter_async_context(make(_RATE))
            except (PeerMissingError, StackError) as error:
                report.skipped.append(f"{name}: {error}")
        found: dict[str, list[Outcome]] = await bench.in_turn(
            report, stacks, "paced", streams=_STREAMS, tokens=_PACED_TOKENS, tokens_per_second=_RATE
        )
    rows = []
    for name, outcomes in found.items():
        own = name == "zfabric gateway"
        cpu = {role: [outcome.cpu_us(role) for outcome in outcomes] for role in (HOP, CONTROLLER, WORKER, "client")}
        goal, reference = (_GOAL_US, "one write a token takes 3.6") if own else (None, "")
        key = name.replace(" ", "_")
        report.metric(f"{key}.http_cpu_per_token_us", cpu[HOP], "µs", "lower", goal=goal, reference=reference)
        rows.append([name, *(f"{percentile(values, 50):.2f}" for values in cpu.values())])
    columns = ["system", "hop", "controller", "worker", "client"]
    title = f"{_STREAMS} streams at {_RATE} tokens/s each: CPU in µs a token"
    report.tables.append(Table(title, columns, rows))
