"""Processes whose interpreter is held for longer than a lease: they are busy and not dead, and others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from tests.fabric import Process, processes, words
from tests.faults.conftest import Row
from tests.faults.holding import HELD_AT, hold_the_interpreter
from zfabric import AsyncClient, TokenStream
from zfabric.core.client.pending import Resume

COUNT, TOKENS = 10, 100


@contextlib.asynccontextmanager
async def parties(directory: Path, *options: str) -> AsyncIterator[AsyncClient]:
    """Over tcp: a controller, a worker with the engine that holds, a steady one, and a client."""
    async with processes(directory) as children:
        controller = await Process.start(
            "zfabric.cli.controller", "--endpoint", "tcp://127.0.0.1:*", *options, directory=directory
        )
        children.append(controller)
        endpoint = (await controller.ready()).partition("endpoint=")[2]
        for name, arguments in (
            ("holding", ("--backend", "tests.faults.holding:Holding")),
            ("steady", ("--tokens-per-second", "50")),
        ):
            worker = await Process.start(
                "zfabric.cli.worker", "--endpoint", endpoint, "--name", name, *arguments, directory=directory
            )
            children.append(worker)
            await worker.ready()
        async with AsyncClient(endpoint) as client:
            yield client


def begin(client: AsyncClient, model: str, resume: Resume) -> tuple[list[TokenStream], list[asyncio.Task[object]]]:
    streams = [
        client.stream(
            model, f"{'hold' if number == 0 else number} x", max_new_tokens=TOKENS, temperature=0.0, resume=resume
        )
        for number in range(COUNT)
    ]
    return streams, [asyncio.create_task(stream.collect()) for stream in streams]


def check(streams: list[TokenStream]) -> None:
    for number, stream in enumerate(streams):
        assert stream.text == words(f"{'hold' if number == 0 else number} x", TOKENS)


async def test_a_worker_that_is_held_for_longer_than_its_lease_goes_on_afterwards(
    run_directory: Path, row: Row
) -> None:
    row.fault = "interpreter of a worker held for 5 s, its lease is 3 s"
    async with parties(run_directory) as client:
        held, waiting = begin(client, "holding", "exact")
        steady, running = begin(client, "echo", "never")
        await asyncio.gather(*running)
        check(steady)
        assert {stream.worker for stream in steady} == {"steady"}
        assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        check(held)
        status = await client.status()
        assert (status.workers, status.workers_lost) == (2, 1)
        row.requests = COUNT


async def test_with_a_lease_that_allows_it_nobody_who_is_held_loses_a_connection(run_directory: Path, row: Row) -> None:
    """Neither the worker nor the client, whose program holds its interpreter as well; what runs cannot go on elsewhere."""
    row.fault = "interpreters of a worker and of a client held for 5 s, the lease is 10 s"
    async with parties(run_directory, "--lease-ms", "10000") as client:
        held, waiting = begin(client, "holding", "never")
        steady, running = begin(client, "echo", "never")
        while any(len(stream.text.split()) < HELD_AT // 2 for stream in held):
            await asyncio.sleep(0.005)
        hold_the_interpreter()
        await asyncio.gather(*running, *waiting)
        check(held)
        check(steady)
        figures, status = client.figures(), await client.status()
        assert figures["failovers"] == figures["claims"] == figures["gaps"] == 0
        assert figures["connections"] == 1
        assert (status.workers, status.workers_lost, status.clients_lost) == (2, 0, 0)
        row.requests = 2 * COUNT
