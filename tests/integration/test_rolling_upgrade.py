"""A fabric is upgraded part by part, while answers run: the version before and this one, side by side, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from tests.fabric import at_rest, words
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.testing.older import as_of_2_0
from zfabric.wire.kinds import MINOR_VERSION
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

TOKENS = 150
STREAMS = 6


class OlderLink:
    """A socket through which nothing goes out that version 2.0 has not."""

    def __init__(self, link: Any) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def send_all(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        self._link.send_all([(as_of_2_0(header), body) for header, body in messages])

    def send(self, to: Any, header: bytes, body: bytes) -> bool:
        sent: bool = self._link.send(to, as_of_2_0(header), body)
        return sent


class OlderController(Controller):
    def _open_router(self, *arguments: Any) -> Any:
        return OlderLink(super()._open_router(*arguments))

    def link_message(self, sender: Any, header: bytes, body: bytes) -> None:
        super().link_message(sender, as_of_2_0(header), body)


class OlderWorker(WorkerService):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_links" and value is not None:
            dial = value._dial

            def dialed(endpoint: str) -> None:
                dial(endpoint)
                link = value._all[endpoint]
                link.driver, hear = OlderLink(link.driver), link.link_message
                link.link_message = lambda header, body: hear(as_of_2_0(header), body)

            value._dial = dialed
        super().__setattr__(name, value)


@contextlib.asynccontextmanager
async def a_client(endpoint: str, *, older: bool) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(endpoint) as client:
        if older:
            connection = client._connection
            hear = connection.link_message
            connection.link_message = lambda header, body: hear(as_of_2_0(header), body)  # type: ignore[method-assign]
            connection._link = OlderLink(connection._link)
        yield client


class Workers:
    """Those of one test, by name."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._running: dict[str, tuple[WorkerService, asyncio.Task[None]]] = {}

    async def start(self, name: str, *, older: bool) -> None:
        """Returns when it is registered."""
        ready = asyncio.Event()
        service = (OlderWorker if older else WorkerService)(
            [EchoWorker(EchoOptions(tokens_per_second=200))],
            WorkerConfig(endpoint=self.endpoint, name=name, slots=2 * STREAMS),
            on_ready=lambda _: ready.set(),
        )
        self._running[name] = service, asyncio.create_task(service.run())
        await ready.wait()

    async def replace(self, name: str, successor: str) -> None:
        """One of this version comes, and the other leaves; what it has goes on elsewhere."""
        await self.start(successor, older=False)
        service, task = self._running.pop(name)
        await service.drain(0)
        await task

    async def close(self) -> None:
        for service, task in self._running.values():
            await service.drain(0)
            await task


class Streams:
    """Answers that are read as they come."""

    def __init__(self, client: AsyncClient) -> None:
        self.texts = [""] * STREAMS
        self._counts = [0] * STREAMS
        self._moved = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(client, number)) for number in range(STREAMS)]

    async def _read(self, client: AsyncClient, number: int) -> None:
        async for delta in client.stream("echo", f"a b {number}", max_new_tokens=TOKENS, temperature=0):
            self.texts[number] += delta.text
            self._counts[number] += len(delta.token_ids)
            self._moved.set()

    async def reach(self, count: int) -> None:
        """Wait until each has so many tokens."""
        while min(self._counts) < count:
            self._moved.clear()
            failed = [task for task in self._tasks if task.done() and task.exception()]
            assert not failed, failed[0].exception()
            await self._moved.wait()

    async def check(self) -> None:
        """All of them come to their end, with every token once."""
        await asyncio.gather(*self._tasks)
        assert self.texts == [words(f"a b {number}", TOKENS) for number in range(STREAMS)]


async def minors(client: AsyncClient) -> dict[str, int]:
    return {worker.name: worker.minor for worker in await client.workers()}


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("first", ["controller", "workers"])
async def test_no_token_is_lost_whoever_is_upgraded_first(ipc: str, first: str) -> None:
    """Two clients, one of each version, read all the while; the controller is restarted, and both workers are replaced."""
    config = ControllerConfig(endpoints=(ipc,))
    workers = Workers(ipc)
    async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
        controller: Controller = await stack.enter_async_context(OlderController(config))
        for name in ("w0", "w1"):
            await workers.start(name, older=True)
        older = await stack.enter_async_context(a_client(ipc, older=True))
        newer = await stack.enter_async_context(a_client(ipc, older=False))
        assert await minors(newer) == {"w0": 0, "w1": 0}
        streams = [Streams(older), Streams(newer)]

        async def upgrade_controller(reached: int) -> None:
            nonlocal controller
            for it in streams:
                await it.reach(reached)
            await controller.__aexit__(None, None, None)
            controller = await Controller(config).__aenter__()

        async def upgrade_workers(reached: int) -> None:
            for position, name in enumerate(("w0", "w1")):
                for it in streams:
                    await it.reach(reached + 10 * position)
                await workers.replace(name, f"n{position}")

        steps = [upgrade_controller, upgrade_workers]
        for position, step in enumerate(steps if first == "controller" else steps[::-1]):
            await step(10 + 40 * position)
        for it in streams:
            await it.check()
        assert await minors(newer) == {"n0": MINOR_VERSION, "n1": MINOR_VERSION}
        told = {row.number: row.minor for row in (await newer.clients()).rows}
        assert sorted(told.values()) == [0, MINOR_VERSION]
        await at_rest(controller)
        await workers.close()
    await controller.__aexit__(None, None, None)
