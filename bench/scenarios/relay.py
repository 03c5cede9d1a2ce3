"""Messages through the real controller, with all its bookkeeping, against libzmq's own relay in C."""

from __future__ import annotations

import sys
from statistics import median

from bench.record import Report, Table
from bench.runner import Bench, ratios
from bench.stack import Part, Stack, free_port, own_python
from bench.subjects import CELL, HOP

NAME = "relay"
TITLE = "Relay: the controller against zmq_proxy"


def flooded(mode: str, workers: int = 1, clients: int = 1) -> Stack:
    """A relay between peers that do nothing but send and receive. MODE is "fabric", "cell" for two controllers in a row, or
    "proxy"."""
    front, back = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    hop: tuple[str, ...] = (sys.executable, "-m", "bench.servers.proxy", front, back)
    if mode == "fabric":
        back = front
        hop = (sys.executable, "-m", "zfabric.cli.controller", "--endpoint", front, "--recovery-ms", "0")
    below: list[Part] = []
    if mode == "cell":
        controller = (sys.executable, "-m", "zfabric.cli.controller", "--endpoint")
        hop, mode = (*controller, front), "fabric"
        below = [Part(CELL, (*controller, back, "--recovery-ms", "0", "--parent", front, "--cell", "cell"))]
    peers = (str(workers), str(clients))
    parts = [
        Part(HOP, hop),
        *below,
        Part("send", (sys.executable, "-m", "bench.flood", "send", mode, back, *peers)),
        Part("receive", (sys.executable, "-m", "bench.flood", "receive", mode, front, *peers)),
    ]
    return Stack(parts, "", front, own_python())


async def flood(stack: Stack, messages: int, tokens: int = 1, role: str = HOP) -> tuple[float, float]:
    """Send so many messages. Returns messages a second, and the relay's CPU in microseconds a message."""
    before = stack.cpu()[role]
    seconds = float(await stack.tell("send", f"{messages} {tokens}"))
    return messages / seconds, (stack.cpu()[role] - before) / messages * 1e6


async def run(bench: Bench, report: Report) -> None:
    """One route, one-token chunks of about thirty bytes; and chunks of 64 tokens, as a step of 64 streams leaves."""
    messages = 128 * (800 if bench.quick else 4_000)
    rates: dict[str, list[float]] = {"fabric": [], "proxy": []}
    costs: dict[str, list[float]] = {"fabric": [], "proxy": []}
    batched: list[float] = []
    async with flooded("fabric") as fabric, flooded("proxy") as proxy:
        for turn in range(bench.rounds + 1):
            for name, stack in (("fabric", fabric), ("proxy", proxy)):
                bench.say(f"flood · {name} · round {turn}")
                rate, cost = await flood(stack, messages)
                if turn:
                    rates[name].append(rate)
                    costs[name].append(cost)
            batched.append((await flood(fabric, messages // 8, 64))[1] / 64)
    report.metric(
        "messages_ratio", ratios(rates["fabric"], rates["proxy"]), "×", "higher", goal=1.2, reference="zmq_proxy"
    )
    report.metric("messages_per_second", rates["fabric"], "1/s", "higher")
    report.metric("proxy_messages_per_second", rates["proxy"], "1/s", "higher")
    report.metric(
        "controller_cpu_per_token_us",
        costs["fabric"],
        "µs",
        "lower",
        goal=1.2,
        reference="unbatched; Rust routers 21–26",
    )
    report.metric(
        "controller_cpu_per_token_step_of_64_us", batched[1:], "µs", "lower", goal=0.2, reference="step-batched by 64"
    )
    report.metric("proxy_cpu_per_message_us", costs["proxy"], "µs", "lower")
    report.tables.append(
        Table(
            TITLE,
            ["relay", "messages/s", "CPU µs per message"],
            [[name, f"{median(rates[name]):,.0f}", f"{median(costs[name]):.2f}"] for name in rates],
        )
    )
    report.unequal.append(
        "The proxy keeps no routes, leases or sessions, and its worker names the client in a frame more."
    )
