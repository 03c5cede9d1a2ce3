"""A request that kills the workers that take it ends after the second, and takes nobody along."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fabric import Process, fabric, processes, words
from tests.faults.poisoned import POISON
from zfabric import AsyncClient
from zfabric.client.stream import TokenStream
from zfabric.errors import PoisonousRequestError

WORKER = "zfabric.cli.worker"
PROMPT = "a b c"
TOKENS = 100


async def test_a_poisonous_request_kills_two_workers_and_no_stream(ipc: str, run_directory: Path) -> None:
    async with fabric(ipc) as made, processes(run_directory) as children:
        for number in range(3):
            backend = ("--backend", "tests.faults.poisoned:Poisoned", "--tokens-per-second", "50")
            child = await Process.start(
                WORKER, "--endpoint", made.endpoint, "--name", f"w{number}", *backend, directory=run_directory
            )
            children.append(child)
        for child in children:
            await child.ready()
        # Who stands beside it may be moved to the worker that dies next, before it has got a token there.
        async with AsyncClient(made.endpoint) as client, AsyncClient(made.endpoint, worker_deaths_max=3) as others:
            streams = [others.stream("echo", PROMPT, max_new_tokens=TOKENS) for _ in range(12)]
            begun = [(await anext(stream)).text for stream in streams]
            with pytest.raises(PoisonousRequestError, match="2 workers in a row died"):
                await client.generate("echo", POISON)
            rest = await asyncio.gather(*(_rest(stream) for stream in streams))
            assert [first + more for first, more in zip(begun, rest, strict=True)] == [words(PROMPT, TOKENS)] * 12
            (survivor,) = await client.workers()
        dead = [child for number, child in enumerate(children) if f"w{number}" != survivor.name]
        assert [await child.ended() for child in dead] == [-9, -9]


async def _rest(stream: TokenStream) -> str:
    return "".join([delta.text async for delta in stream])
