"""The load: one process with one client, which takes jobs as JSON lines and answers with raw samples.

``python -m bench.drive ADAPTER TARGET``. It runs in the virtual environment of the system it drives, and needs nothing
but the standard library, uvloop and that system's client.

Jobs (all times in seconds, all samples in microseconds):

- ``closed``: one request after another, so many or for so long. Samples: time to the first token of each.
- ``open``: requests at random times of a given rate, whatever the answers do; each is timed from when it was *due*, so
  a stall counts against every request that it delays (no coordinated omission).
- ``flood``: so many requests at a time, each followed by the next, for so long.
- ``streams``: so many answers of so many tokens at once.
- ``cancel``: one stream after another, each given up in its middle. Samples: when, on the system's monotonic clock, in ns.
- ``watch``: streams that something happens to. Samples: the longest silence in each that came whole; lost ones counted.
- ``paced``: the same against an engine that keeps its own time. Samples: how far each gap between two tokens of a
  stream is from the engine's interval; and times to the first token.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from bench.adapters import Adapter

Job = dict[str, Any]
Result = dict[str, Any]


def _prompt(job: Job) -> str:
    if "words" in job:
        return "word " * int(job["words"])
    size = int(job.get("prompt_bytes", 0))
    # Words of 31 letters: the longest prompts hold no more words than an echo splits.
    return f"{'w' * 31} " * (size // 32) if size else "the quick brown fox jumps over the lazy dog"


class _First:
    """Notes when the first token came, and counts them all."""

    __slots__ = ("at", "count")

    def __init__(self) -> None:
        self.at = 0.0
        self.count = 0

    def __call__(self, count: int) -> None:
        if not self.count:
            self.at = time.perf_counter()
        self.count += count


async def closed(adapter: Adapter, job: Job) -> Result:
    prompt, tokens, samples = _prompt(job), int(job.get("tokens", 1)), []
    began = time.perf_counter()
    end = began + float(job.get("seconds", 60))
    for _ in range(int(job.get("requests", 1_000_000))):
        if time.perf_counter() > end:
            break
        first, start = _First(), time.perf_counter()
        await adapter.ask(prompt, tokens, first)
        samples.append((first.at - start) * 1e6)
    return {"samples": samples, "wall_s": time.perf_counter() - began, "requests": len(samples)}


async def open_loop(adapter: Adapter, job: Job) -> Result:
    rng, prompt, tokens = random.Random(job.get("seed", 1)), _prompt(job), int(job.get("tokens", 1))
    samples: list[float] = []
    running: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        first = _First()
        await adapter.ask(prompt, tokens, first)
        samples.append((first.at - due) * 1e6)

    began = due = time.perf_counter()
    end = began + float(job["seconds"])
    while True:
        due += rng.expovariate(float(job["rate"]))
        if due >= end:
            break
        while (left := due - time.perf_counter()) > 0:
            # A timer of the loop is a millisecond coarse: sleep most of the way, then let the loop turn.
            await asyncio.sleep(left - 0.001 if left > 0.002 else 0)
        task = asyncio.create_task(one(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return {"samples": samples, "wall_s": time.perf_counter() - began, "requests": len(samples)}


async def flood(adapter: Adapter, job: Job) -> Result:
    prompt, tokens, count = _prompt(job), int(job.get("tokens", 1)), 0
    began = time.perf_counter()
    end = began + float(job["seconds"])

    async def lane() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await adapter.ask(prompt, tokens, _First())
            count += 1

    await asyncio.gather(*(lane() for _ in range(int(job["concurrency"]))))
    return {"samples": [], "wall_s": time.perf_counter() - began, "requests": count}


async def streams(adapter: Adapter, job: Job) -> Result:
    prompt, tokens, count = _prompt(job), int(job["tokens"]), int(job["streams"])
    firsts = [_First() for _ in range(count)]
    began = time.perf_counter()
    await asyncio.gather(*(adapter.ask(prompt, tokens, first) for first in firsts))
    wall_s = time.perf_counter() - began
    got = sum(first.count for first in firsts)
    if got != tokens * count:
        raise RuntimeError(f"{got} tokens came, {tokens * count} were asked for")
    return {"samples": [(first.at - began) * 1e6 for first in firsts], "wall_s": wall_s, "tokens": got}


async def paced(adapter: Adapter, job: Job) -> Result:
    prompt, tokens, interval = _prompt(job), int(job["tokens"]), 1 / float(job["tokens_per_second"])
    count = int(job["streams"])
    jitter: list[float] = []
    firsts: list[float] = []

    async def one(delay: float) -> None:
        await asyncio.sleep(delay)
        start, last = time.perf_counter(), 0.0

        def arrived(number: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if last:
                # Several tokens at once: the first is late, the others cost their reader nothing more.
                jitter.append(abs(now - last - interval) * 1e6)
                jitter.extend([0.0] * (number - 1))
            else:
                firsts.append((now - start) * 1e6)
            last = now

        await adapter.ask(prompt, tokens, arrived)

    began = time.perf_counter()
    await asyncio.gather(*(one(number / count * interval * 5) for number in range(count)))
    wall_s = time.perf_counter() - began
    return {"samples": jitter, "firsts": firsts, "wall_s": wall_s, "tokens": tokens * count}


async def cancel(adapter: Adapter, job: Job) -> Result:
    given: list[float] = []
    for _ in range(int(job["count"])):
        first = _First()
        task = asyncio.create_task(adapter.ask(_prompt(job), 100_000, first))
        while not first.count:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.015)
        given.append(float(time.monotonic_ns()))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.02)
    return {"samples": given, "wall_s": 1.0, "requests": len(given)}


async def watch(adapter: Adapter, job: Job) -> Result:
    longest: list[float] = []
    lost = 0

    async def one() -> None:
        nonlocal lost
        last, gap, got = time.perf_counter(), 0.0, 0

        def arrived(number: int) -> None:
            nonlocal last, gap, got
            now = time.perf_counter()
            # The way to the first token is not a gap.
            gap, last, got = max(gap, now - last) if got else 0.0, now, got + number

        try:
            await adapter.ask(_prompt(job), int(job["tokens"]), arrived)
        except Exception:  # noqa: BLE001 — a lost stream is what is being counted
            lost += 1
            return
        if got < int(job["tokens"]):
            lost += 1
        else:
            longest.append(gap * 1e6)

    await asyncio.gather(*(one() for _ in range(int(job["streams"]))))
    return {"samples": longest, "firsts": [float(lost)], "wall_s": 1.0, "requests": int(job["streams"])}


JOBS: dict[str, Callable[[Adapter, Job], Awaitable[Result]]] = {
    "closed": closed,
    "open": open_loop,
    "flood": flood,
    "streams": streams,
    "paced": paced,
    "cancel": cancel,
    "watch": watch,
}


async def serve(adapter: Adapter, target: str) -> None:
    """Take jobs from standard input until it ends."""
    loop = asyncio.get_running_loop()
    await adapter.open(target)
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        job = json.loads(line)
        gc.collect()
        before = time.process_time()
        try:
            result = await asyncio.wait_for(JOBS[job["job"]](adapter, job), timeout=job.get("limit_s", 120))
        except Exception as error:  # noqa: BLE001 — whatever a peer does wrong is the suite's to report
            result = {"error": f"{type(error).__name__}: {error}"}
        result["cpu_s"] = time.process_time() - before
        print(json.dumps(result), flush=True)
    await adapter.close()


def main() -> None:
    name, target = sys.argv[1:3]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
    uvloop.run(serve(importlib.import_module(f"bench.adapters.{name}").make(), target))


if __name__ == "__main__":
    main()
