"""How soon a worker answers while its model computes, as its client sees it: controller and worker are processes.

Eight streams decode, and two long prompts arrive one after the other. Meanwhile, every 20 ms:

- ``status``: from a call to this worker (`list_adapters`) to its answer;
- ``cancel``: from a cancel to the answer of a call sent right behind it, by which time the worker has obeyed it.

``gaps`` are the times between two deltas of a stream, of all streams of eight. ``worker_timers``, where the worker has a probe,
is by how much timers of its own event loop are late; a beat is such a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.engines.runs import Run
from zfabric import AsyncClient
from zfabric.transport.links import Transport

STREAMS = 8
#: More than are ever asked for at once.
STREAMS_MAX = 1_000
PROMPT_TOKENS = 24
LONG_TOKENS = 2_000
LONG_PROMPTS = 2
IDLE_CALLS = 200
PROBE_INTERVAL_S = 0.02
WORKER = "measured"

Prompt = Callable[[int, int], list[int]]


async def _consumed(
    client: AsyncClient,
    tokens: list[int],
    count: int,
    begun: asyncio.Event | None = None,
    gaps: list[float] | None = None,
) -> tuple[int, float]:
    """How many tokens came, and when the first did; and the times between two deltas."""
    seen, first, last = 0, 0.0, 0.0
    options: dict[str, Any] = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
    async for delta in client.stream(WORKER, prompt_token_ids=tokens, **options):
        now = time.perf_counter()
        seen += len(delta.token_ids)
        first = first or now
        if gaps is not None and last:
            gaps.append(now - last)
        last = now
        if begun is not None:
            begun.set()
    return seen, first


async def _status(client: AsyncClient) -> float:
    began = time.perf_counter()
    await client.operate(WORKER, "list_adapters")
    return time.perf_counter() - began


async def _cancel(client: AsyncClient, tokens: list[int]) -> float:
    stream = client.stream(WORKER, prompt_token_ids=tokens, max_new_tokens=100, ignore_eos=True)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    began = time.perf_counter()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await stream.aclose()
    await client.operate(WORKER, "list_adapters")
    return time.perf_counter() - began


def seeds(run: int, streams: int) -> range:
    """Of prompts that no other run and number of streams has: a worker keeps what it has read."""
    begin = (run * STREAMS_MAX + streams) * STREAMS_MAX
    return range(begin, begin + streams)


async def together(client: AsyncClient, prompt: Prompt, count: int, streams: int, run: int = 0) -> Run:
    """So many undisturbed answers at once, of prompts that no other run has."""
    began = time.perf_counter()
    asked = (_consumed(client, prompt(seed, PROMPT_TOKENS), count) for seed in seeds(run, streams))
    answers = await asyncio.gather(*asked)
    rate = sum(seen for seen, _ in answers) / (time.perf_counter() - began)
    return Run(rate, (statistics.median(first for _, first in answers) - began) * 1_000)


async def measure(
    client: AsyncClient, count: int, prompt: Prompt, *, long_tokens: int = LONG_TOKENS, probed: bool = True
) -> dict[str, list[float]]:
    """Times in seconds by name; and `tokens_per_s` of the eight streams, all of it.

    Args:
        count: Tokens of each stream.
        prompt: Makes a prompt of a seed and a length.
        long_tokens: Of each prompt that arrives meanwhile.
        probed: Whether the worker watches its own event loop.
    """
    found: dict[str, list[float]] = {"status_idle": [await _status(client) for _ in range(IDLE_CALLS)]}
    firsts = [asyncio.Event() for _ in range(STREAMS)]
    began = time.perf_counter()
    gaps = found["gaps"] = []
    asked = (_consumed(client, prompt(seed, PROMPT_TOKENS), count, first, gaps) for seed, first in enumerate(firsts))
    streams = asyncio.gather(*asked)
    for first in firsts:
        await first.wait()
    if probed:
        await client.operate(WORKER, "lateness")

    async def long_prompts() -> None:
        for seed in range(LONG_PROMPTS):
            await _consumed(client, prompt(100 + seed, long_tokens), 1)

    arriving = asyncio.ensure_future(long_prompts())
    found["status"], found["cancel"] = [], []
    while not (streams.done() and arriving.done()):
        found["status"].append(await _status(client))
        found["cancel"].append(await _cancel(client, prompt(200, PROMPT_TOKENS)))
        await asyncio.sleep(PROBE_INTERVAL_S)
    seconds = time.perf_counter() - began
    found["tokens_per_s"] = [sum(seen for seen, _ in await streams) / seconds]
    if probed:
        found["worker_timers"] = await client.operate(WORKER, "lateness")
    return found


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds; the count alone where all was over before anything could be measured."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    at = {
        name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    figures = {name: round(value * 1_000, 3) for name, value in {**at, "max": ordered[-1]}.items()}
    return {"count": len(ordered), **figures}


def told(times: dict[str, list[float]]) -> dict[str, Any]:
    """What was measured, in milliseconds; and the median of tokens per second."""
    rate = round(statistics.median(times["tokens_per_s"]), 1)
    return {"tokens_per_s": rate, **{kind: summary(found) for kind, found in times.items() if kind != "tokens_per_s"}}


async def in_turn(
    clients: Mapping[Transport, AsyncClient], rounds: int, count: int, prompt: Prompt, **options: Any
) -> dict[str, Any]:
    """The same on a fabric of each driver, in turns, since what disturbs one is to disturb all."""
    times: dict[Transport, dict[str, list[float]]] = {transport: {} for transport in clients}
    for client in clients.values():
        await together(client, prompt, 8, STREAMS)
    for number in range(rounds):
        for transport, client in clients.items():
            print(f"answers on {transport}, round {number + 1}", file=sys.stderr, flush=True)
            for kind, seconds in (await measure(client, count, prompt, **options)).items():
                times[transport].setdefault(kind, []).extend(seconds)
    return {transport: told(found) for transport, found in times.items()}
