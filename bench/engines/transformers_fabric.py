"""How soon a ModelWorker answers while its model computes, as its client sees it: controller and worker are processes.

Eight streams decode, and two prompts of 2,000 tokens arrive one after the other. Meanwhile, every 20 ms:

- ``status``: from a call to this worker (`list_adapters`) to its answer;
- ``cancel``: from a cancel to the answer of a call sent right behind it, by which time the worker has obeyed it.

``gaps`` are the times between two deltas of a stream, of all streams of eight.

``worker_timers`` is by how much timers of the worker's own event loop are late; a beat is such a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bench.engines.runs import Run
from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.transport.links import Transport
from zfabric.wire.payloads import OperateRequest

STREAMS = 8
PROMPT_TOKENS = 24
LONG_TOKENS = 2_000
LONG_PROMPTS = 2
IDLE_CALLS = 200
PROBE_INTERVAL_S = 0.02
TIMER_S = 0.01
WORKER = "measured"

Prompt = Callable[[int, int], list[int]]


class ProbedWorker(ModelWorker):
    """A ModelWorker whose event loop is watched from within: its call `lateness` gives what was noted since the last."""

    async def load(self) -> Any:
        found = await super().load()
        self._late: list[float] = []
        self._probe = asyncio.create_task(self._note())
        return found

    async def _note(self) -> None:
        while True:
            due = time.perf_counter() + TIMER_S
            await asyncio.sleep(TIMER_S)
            self._late.append(max(0.0, time.perf_counter() - due))

    async def operate(self, request: OperateRequest) -> Any:
        if request.call != "lateness":
            return await super().operate(request)
        late, self._late = self._late, []
        return late

    async def close(self) -> None:
        self._probe.cancel()
        await super().close()


@contextlib.asynccontextmanager
async def served(model: Path, *arguments: str, transport: Transport) -> AsyncIterator[AsyncClient]:
    """A client of a controller with one worker, all three on one driver."""
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        endpoint = f"ipc://{name}/c.sock"
        async with processes(Path(name)) as children:

            async def start(module: str, *more: str) -> None:
                common = ("--endpoint", endpoint, "--transport", transport)
                child = await Process.start(module, *common, *more, directory=Path(name))
                children.append(child)
                await child.ready()

            await start("zfabric.cli.controller")
            backend = f"{ProbedWorker.__module__}:{ProbedWorker.__qualname__}"
            await start(
                "zfabric.cli.worker", "--name", WORKER, "--backend", backend, "--model", str(model),
                "--model-names", WORKER, "--context-length", "4096", *arguments,
            )  # fmt: skip
            async with AsyncClient(endpoint, transport=transport) as client:
                yield client


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


async def together(client: AsyncClient, prompt: Prompt, count: int, streams: int) -> Run:
    """So many undisturbed answers at once."""
    began = time.perf_counter()
    asked = (_consumed(client, prompt(seed, PROMPT_TOKENS), count) for seed in range(streams))
    answers = await asyncio.gather(*asked)
    rate = sum(seen for seen, _ in answers) / (time.perf_counter() - began)
    return Run(rate, (statistics.median(first for _, first in answers) - began) * 1_000)


async def measure(client: AsyncClient, count: int, prompt: Prompt) -> dict[str, list[float]]:
    """Times in seconds by name; and `tokens_per_s` of the eight streams, all of it.

    Args:
        count: Tokens of each stream.
        prompt: Makes a prompt of a seed and a length.
    """
    found: dict[str, list[float]] = {"status_idle": [await _status(client) for _ in range(IDLE_CALLS)]}
    firsts = [asyncio.Event() for _ in range(STREAMS)]
    began = time.perf_counter()
    gaps = found["gaps"] = []
    asked = (_consumed(client, prompt(seed, PROMPT_TOKENS), count, first, gaps) for seed, first in enumerate(firsts))
    streams = asyncio.gather(*asked)
    for first in firsts:
        await first.wait()
    await client.operate(WORKER, "lateness")

    async def long_prompts() -> None:
        for seed in range(LONG_PROMPTS):
            await _consumed(client, prompt(100 + seed, LONG_TOKENS), 1)

    arriving = asyncio.ensure_future(long_prompts())
    found["status"], found["cancel"] = [], []
    while not (streams.done() and arriving.done()):
        found["status"].append(await _status(client))
        found["cancel"].append(await _cancel(client, prompt(200, PROMPT_TOKENS)))
        await asyncio.sleep(PROBE_INTERVAL_S)
    seconds = time.perf_counter() - began
    found["tokens_per_s"] = [sum(seen for seen, _ in await streams) / seconds]
    found["worker_timers"] = await client.operate(WORKER, "lateness")
    return found
