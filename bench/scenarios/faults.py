"""When something dies under load: how long no token comes, what is lost, and how soon an engine stops for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import subjects
from bench.record import Report, Table
from bench.runner import Bench, percentile
from bench.stack import Stack, StackError
from bench.subjects import HOP
from bench.venvs import PeerMissingError

NAME = "faults"
TITLE = "Faults: deaths and cancels under load"
_RATE = 100
#: What a dead client's streams have to end. zfabric lets a lost connection come back for 1.5 s before it takes it for a death.
_DEATH_S = 3.0
_STREAMS = 32
_SYSTEMS: dict[str, Callable[..., Stack]] = {
    "zfabric": subjects.fabric_pair,
    "fastchat": subjects.fastchat_pair,
    "vllm-router": subjects.vllm_router_pair,
    "sglang-router": subjects.sglang_router_pair,
    "smg": subjects.smg_pair,
}


async def run(bench: Bench, report: Report) -> None:
    """Two workers, 32 streams of 100 tokens a second."""
    rows = []
    for name in _SYSTEMS:
        if bench.only and name not in bench.only:
            continue
        try:
            row = [await _cancels(bench, report, name), await _client_death(bench, report, name)]
            row += [await _death(bench, report, name, "worker"), await _death(bench, report, name, HOP)]
            rows.append([name, *row])
        except (PeerMissingError, StackError, TimeoutError) as error:
            report.skipped.append(f"{name}: {error}")
    columns = [
        "system",
        "cancel → abort p50 / p99",
        "client SIGKILL → last abort",
        "worker SIGKILL",
        "relay SIGKILL, back at once",
    ]
    report.tables.append(
        Table("Milliseconds; or how many of the streams were lost (half of them ran on the worker)", columns, rows)
    )
    report.unequal.append(
        "FastChat and the routers promise no continuation: a stream on what dies is lost, and is counted."
    )


@contextlib.asynccontextmanager
async def _system(name: str, aborts: Path | None = None) -> AsyncIterator[Stack]:
    environment = {"ECHO_ABORTS": str(aborts)} if aborts else {}
    async with _SYSTEMS[name](_RATE, **environment) as stack:
        yield stack


def _abort_times_ns(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


async def _cancels(bench: Bench, report: Report, name: str) -> str:
    """A reader gives up; when does the engine know?"""
    bench.say(f"cancel · {name}")
    count = 40 if bench.quick else 200
    with TemporaryDirectory() as directory:
        aborts = Path(directory) / "aborts"
        async with _system(name, aborts) as stack:
            await stack.run("cancel", count=5)
            at = (await stack.run("cancel", count=count)).samples
            await asyncio.sleep(0.3)
        times = _abort_times_ns(aborts)
    delays = []
    for given in at:
        after = [moment for moment in times if moment >= given]
        if after:
            delays.append((after[0] - given) / 1e6)
    if len(delays) < count or max(delays) > 1_000:
        late = count - sum(delay <= 1_000 for delay in delays)
        report.metric(f"{name}.cancels_not_noticed_in_1s", [float(late)], "of all", "lower")
        return f"{late} of {count} not within 1 s"
    goal, reference = (5.0, "client to engine") if name == "zfabric" else (None, "")
    report.metric(f"{name}.cancel_p99_ms", [percentile(delays, 99)], "ms", "lower", goal=goal, reference=reference)
    return f"{percentile(delays, 50):.1f} / {percentile(delays, 99):.1f}"


async def _client_death(bench: Bench, report: Report, name: str) -> str:
    """The client's process dies with all its streams."""
    bench.say(f"client death · {name}")
    with TemporaryDirectory() as directory:
        aborts = Path(directory) / "aborts"
        async with _system(name, aborts) as stack:
            watching = asyncio.create_task(stack.run("watch", streams=_STREAMS, tokens=100_000, limit_s=60))
            await asyncio.sleep(1.0)
            killed_ns = time.monotonic_ns()
            stack.kill("client")
            with contextlib.suppress(StackError):
                await watching
            await asyncio.sleep(_DEATH_S)
        times = [moment for moment in _abort_times_ns(aborts) if moment >= killed_ns]
    if len(times) < _STREAMS:
        return f"{_STREAMS - len(times)} of {_STREAMS} not within {_DEATH_S:g} s"
    last_ms = (max(times) - killed_ns) / 1e6
    report.metric(f"{name}.client_death_last_abort_ms", [last_ms], "ms", "lower")
    return f"{last_ms:.1f}"


async def _death(bench: Bench, report: Report, name: str, role: str) -> str:
    """One of two workers dies for good; or the relay dies and is started again at once."""
    bench.say(f"{role} death · {name}")
    async with _system(name) as stack:
        watching = asyncio.create_task(stack.run("watch", streams=_STREAMS, tokens=4 * _RATE, limit_s=30))
        await asyncio.sleep(1.5)
        stack.kill(role)
        if role == HOP:
            await stack.restart(role)
        outcome = await watching
    gaps, lost = outcome.samples, int(outcome.firsts[0])
    report.metric(f"{name}.{role}_death_streams_lost", [float(lost)], "streams", "lower")
    if lost:
        return f"lost {lost} of {_STREAMS}"
    longest_ms = max(gaps) / 1e3
    goal = 50.0 if name == "zfabric" and role == "worker" else None
    report.metric(f"{name}.{role}_death_longest_gap_ms", [longest_ms], "ms", "lower", goal=goal, reference="no token")
    return f"{longest_ms:.0f}"
