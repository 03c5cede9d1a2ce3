"""What size costs: streams, workers, clients, models; and what a request in flight holds in memory."""

from __future__ import annotations

import random
import time
import tracemalloc

from bench.record import Plot, Report, Table
from bench.runner import Bench
from bench.scenarios.relay import flood, flooded
from bench.subjects import HOP
from zfabric.core.controller.broker import Broker
from zfabric.core.controller.config import BrokerConfig
from zfabric.ids import RoutingId
from zfabric.wire import codec, kinds
from zfabric.wire.load import Load
from zfabric.wire.messages import ClientHello, End, Ends, ModelInfo, Submit, WorkerHello

NAME = "scale"
TITLE = "Scale: cost against size"
_CLIENT = RoutingId(b"client")


async def run(bench: Bench, report: Report) -> None:
    """Streams through all processes; workers and clients as so many real connections; the rest in the core alone."""
    rows = await _streams(bench, report)
    for axis in ("workers", "clients"):
        rows += await _connections(bench, report, axis)
    report.tables.append(Table("CPU per token or message, µs", ["axis", "size", "controller", "zmq_proxy"], rows))
    _dispatch(bench, report)
    _models(report)
    _memory(report)
    report.unequal.append(
        "With many connections each carries few messages, so the kernel and libzmq can put fewer into one system call: "
        "the cost of connections is measured with the smallest messages there are, which is its worst case."
    )


async def _streams(bench: Bench, report: Report) -> list[list[str]]:
    stacks = await bench.stacks(report, ["zfabric"])
    costs: dict[int, float] = {}
    for count, tokens in ((64, 400), (1_024, 100), (10_000, 40)):
        found = await bench.in_turn(report, stacks, "streams", streams=count, tokens=tokens, rounds=2)
        if found:
            costs[count] = min(outcome.cpu_us(HOP) for outcome in found["zfabric"])
            report.metric(f"streams_{count}.controller_cpu_per_token_us", [costs[count]], "µs", "lower")
    if 64 in costs and 10_000 in costs:
        ratio = costs[10_000] / costs[64]
        report.metric("streams_10000_ratio", [ratio], "×", "lower", goal=1.25, reference="64 streams")
    line = [(float(count), cost) for count, cost in costs.items()]
    report.plots.append(Plot("Controller's CPU per token", "streams", "µs", {"zfabric": line}))
    return [["streams", f"{count:,}", f"{cost:.2f}", ""] for count, cost in costs.items()]


async def _connections(bench: Bench, report: Report, axis: str) -> list[list[str]]:
    """As many connections as that on one side. The C proxy with as many shows what is libzmq's and the kernel's."""
    costs: dict[str, dict[int, float]] = {"controller": {}, "zmq_proxy": {}}
    for name, mode in (("controller", "fabric"), ("zmq_proxy", "proxy")):
        for count in (1, 100, 1_000):
            bench.say(f"flood · {name} · {count} {axis}")
            async with flooded(mode, **{axis: count}) as stack:
                await flood(stack, 128 * 100)
                costs[name][count] = min([(await flood(stack, 128 * 300))[1] for _ in range(2)])
            report.metric(f"{axis}_{count}.{name}_cpu_per_message_us", [costs[name][count]], "µs", "lower")
        ratio = costs[name][1_000] / costs[name][1]
        key = f"{axis}_1000_ratio" if mode == "fabric" else f"{axis}_1000_ratio_{name}"
        report.metric(key, [ratio], "×", "lower", reference=f"1 of {axis}")
    against = costs["controller"][1_000] / costs["zmq_proxy"][1_000]
    report.metric(f"{axis}_1000_against_zmq_proxy", [against], "×", "lower", goal=1.0, reference="zmq_proxy")
    lines = {name: [(float(n), cost) for n, cost in found.items()] for name, found in costs.items()}
    report.plots.append(Plot(f"CPU per message against {axis}", axis, "µs", lines))
    own, other = costs["controller"], costs["zmq_proxy"]
    return [[axis, f"{count:,}", f"{cost:.2f}", f"{other[count]:.2f}"] for count, cost in own.items()]


def _broker(workers: int, models: int, slots: int = 64, policy: str = "shortest_queue") -> Broker:
    broker = Broker(BrokerConfig(policy=policy, recovery_ms=0), random.Random(1), 0)
    for number in range(workers):
        info = [ModelInfo(name=f"m{model}", capabilities=["generate"]) for model in range(models)]
        hello = WorkerHello(
            version=kinds.PROTOCOL_VERSION,
            build="",
            name=f"w{number}",
            instance=number + 1,
            models=info,
            load=Load(slots=slots),
        )
        broker.receive(RoutingId(b"w%04d" % number), *codec.pack(hello), 0)
    broker.receive(_CLIENT, *codec.pack(ClientHello(version=kinds.PROTOCOL_VERSION, build="", instance=5)), 0)
    broker.outbox.take()
    return broker


def request_us(broker: Broker, count: int, *, models: int = 1, first: int = 0) -> float:
    """Submit, choose, dispatch and end, with what the worker's side costs taken off."""
    submits = [codec.pack_envelope(_submit(n, f"m{n % models}")) for n in range(first, first + count)]
    began, others = time.perf_counter(), 0.0
    for header in submits:
        broker.receive(_CLIENT, header, b"prompt", 1)
        ((to, dispatched, _),) = broker.outbox.take()
        aside = time.perf_counter()
        order = codec.unpack_envelope(dispatched)
        ends = codec.pack_envelope(Ends(instance=5, ends=[End(request=order.request, attempt=0)]))
        others += time.perf_counter() - aside
        broker.receive(to, ends, b"", 1)
        broker.outbox.take()
    return (time.perf_counter() - began - others) / count * 1e6


def _dispatch(bench: Bench, report: Report) -> None:
    rows = []
    for workers in (1, 100, 1_000):
        bench.say(f"dispatch · {workers} workers")
        rounds = [request_us(_broker(workers, 1), 3_000) for _ in range(bench.rounds)]
        goal = 20.0 if workers == 1_000 else None
        report.metric(
            f"dispatch_{workers}_workers_us", rounds, "µs", "lower", goal=goal, reference="core, whole request"
        )
        rows.append([f"{workers:,}", f"{min(rounds):.1f}"])
    report.tables.append(Table("Submit, choose, dispatch, end in the core, µs", ["workers", "µs"], rows))


def _models(report: Report) -> None:
    rows = []
    for models in (1, 10, 100):
        cost = min(request_us(_broker(10, models), 3_000, models=models) for _ in range(3))
        report.metric(f"dispatch_{models}_models_us", [cost], "µs", "lower")
        rows.append([f"{models:,}", f"{cost:.1f}"])
    report.tables.append(Table("The same with ten workers that host so many models", ["models", "µs"], rows))


def _memory(report: Report, count: int = 10_000) -> None:
    broker = _broker(10, 1, slots=2_000)
    submits = [codec.pack_envelope(_submit(number, "m0")) for number in range(count)]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for header in submits:
        broker.receive(_CLIENT, header, b"prompt" * 20, 1)
        broker.outbox.take()
    held = (tracemalloc.get_traced_memory()[0] - before) / count
    tracemalloc.stop()
    report.metric("controller_memory_per_request_bytes", [held], "bytes", "lower", goal=2_048, reference="core alone")


def _submit(number: int, model: str) -> Submit:
    return Submit(request=number, attempt=0, operation="generate", model=model)
