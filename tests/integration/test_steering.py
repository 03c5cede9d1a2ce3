"""Operators over real sockets: a drain that is taken back, a client that is kept out, and what outlives connections."""

from __future__ import annotations

import asyncio

import pytest

from tests.fabric import echo_fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import NoWorkerError, PermissionDeniedError, StoppedByOperatorError
from zfabric.worker.service import WorkerService

SLOW = EchoOptions(tokens_per_second=100)


def drained(service: WorkerService) -> asyncio.Event:
    """Set when the worker has begun to drain, or has taken that back."""
    changed = asyncio.Event()
    log = service._log

    def note(event: str, **fields: object) -> None:
        log(event, **fields)
        if event in ("draining", "drain_withdrawn"):
            changed.set()

    service._log = note
    return changed


@pytest.mark.usefixtures("transport")
async def test_a_worker_that_leaves_stays_when_it_is_told_to(ipc: str) -> None:
    """What it runs runs on, and it takes what waited for it."""
    async with echo_fabric(ipc, options=SLOW) as (made, client), asyncio.timeout(20):
        service = made.services["w0"]
        changed = drained(service)
        running = client.stream("echo", "a b", max_new_tokens=60)
        await anext(running)
        await client.drain_worker("w0")
        await changed.wait()
        assert [worker.state for worker in await client.workers()] == ["draining"]
        waiting = asyncio.create_task(client.generate("echo", "c", max_new_tokens=1))
        while not (await client.queue()).rows:
            pass
        changed.clear()
        assert await client.undrain_worker("w0") == "w0"
        await changed.wait()
        assert (await waiting).worker == "w0"
        assert len([delta async for delta in running]) > 0
        assert not made.tasks["w0"].done()


async def test_what_its_host_wants_is_not_taken_back(ipc: str) -> None:
    async with fabric(ipc) as made, asyncio.timeout(20):
        service = await made.add_worker("w0", EchoWorker(SLOW))
        async with AsyncClient(made.endpoint) as client:
            running = client.stream("echo", "a b", max_new_tokens=30)
            await anext(running)
            leaving = asyncio.create_task(service.drain())
            while [worker.state for worker in await client.workers()] == ["ready"]:
                pass
            await client.undrain_worker("w0")
            assert len([delta async for delta in running]) > 0
            await leaving
            await made.tasks.pop("w0")
            del made.services["w0"]


@pytest.mark.usefixtures("transport")
async def test_a_kicked_client_is_told_by_whom_and_for_how_long(ipc: str) -> None:
    async with (
        echo_fabric(ipc, options=SLOW) as (made, operator),
        AsyncClient(made.endpoint, label="backend") as client,
        asyncio.timeout(20),
    ):
        running = client.stream("echo", "a b", max_new_tokens=10_000)
        await anext(running)
        number = made.controller.broker.registry.clients[operator._connection.session.instance].number
        assert (await operator.kick_client("backend", refuse_ms=60_000)).requests == [running.request_id]
        with pytest.raises(StoppedByOperatorError, match=f"by operator '{number}'"):
            await anext(running)
        with pytest.raises(PermissionDeniedError, match=f"operator '{number}' has ended this client's session"):
            await client.generate("echo", "x", max_new_tokens=1)
        async with AsyncClient(made.endpoint, label="backend") as another:
            assert (await another.generate("echo", "x", max_new_tokens=1)).text == "x "


async def test_orders_hold_while_workers_come_and_go(ipc: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, client), asyncio.timeout(20):
        await client.pause_model("echo", wait_ms=600_000)
        await client.change_setting("speed.w0", 4)
        await made.remove_worker("w0")
        await made.add_worker("w0", EchoWorker(SLOW))
        waiting = asyncio.create_task(client.generate("echo", "c", max_new_tokens=1))
        while not (await client.queue()).rows:
            pass
        (row,) = (await client.requests()).rows
        assert (row.reason, row.place) == ("paused", 1)
        assert [worker.speed for worker in await client.workers()] == [4.0]
        await client.resume_model("echo")
        assert (await waiting).text == "c "
        await client.pause_model("echo", wait_ms=0)
        with pytest.raises(NoWorkerError, match="is paused by operator"):
            await client.generate("echo", "c", max_new_tokens=1)
