"""One fabric with several controllers: workers register at all, clients are at one and move on, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fabric import Fabric, at_rest, words
from zfabric import AsyncClient, limits
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.errors import NoWorkerError
from zfabric.worker.service import WorkerService


@dataclass
class Several:
    """Controllers, and the workers that are registered at all of them."""

    controllers: list[Controller]
    endpoint: str
    workers: list[WorkerService] = field(default_factory=list)

    def home(self, client: AsyncClient) -> Controller:
        """The controller that a client is at."""
        instance = client._connection.session.instance
        return next(it for it in self.controllers if _present(it, instance))

    @property
    def running(self) -> int:
        return sum(service._sessions.count for service in self.workers)


def _present(controller: Controller, instance: int) -> bool:
    client = controller.broker.registry.clients.get(instance)
    return client is not None and not client.away


@contextlib.asynccontextmanager
async def several(
    directory: Path, controllers: int = 2, workers: int = 1, *, options: EchoOptions | None = None, **config: Any
) -> AsyncIterator[Several]:
    async with contextlib.AsyncExitStack() as stack:
        made: list[Controller] = []
        for number in range(controllers):
            broker = BrokerConfig(recovery_ms=0)
            settings = ControllerConfig(endpoints=(f"ipc://{directory}/{number}.sock",), broker=broker)
            made.append(await stack.enter_async_context(Controller(settings)))
        fabric = Several(list(made), ",".join(controller.endpoints[0] for controller in made))
        hosts = Fabric(fabric.endpoint, made[0])
        for number in range(workers):
            fabric.workers.append(await hosts.add_worker(f"w{number}", EchoWorker(options), **config))
        async with asyncio.timeout(10):
            while any(len(controller.broker.registry.workers) < workers for controller in made):
                await asyncio.sleep(0.005)
        yield fabric
        for controller in fabric.controllers:
            await at_rest(controller)
        for name in list(hosts.services):
            await hosts.remove_worker(name)


async def test_a_stream_goes_on_by_another_controller_at_the_same_worker(tmp_path: Path) -> None:
    options = EchoOptions(tokens_per_second=500)
    async with several(tmp_path, 3, 2, options=options) as made, AsyncClient(made.endpoint) as client:
        stream = client.stream("echo", "a b c", max_new_tokens=200)
        text = ""
        homes = []
        moves = [20, 100, 200]
        async for delta in stream:
            text += delta.text
            if moves and len(text) >= moves[0]:
                del moves[0]
                homes.append(made.home(client))
                client._connection._leave()
        assert text == words("a b c", 200)
        assert len(set(map(id, homes))) == 3
        # The very attempt that began went on.
        assert client.figures()["failovers"] == 0
        assert client.figures()["gaps"] == client.figures()["repeated_chunks"] == 0


async def test_what_waits_in_a_queue_waits_on_by_another_controller(tmp_path: Path) -> None:
    options = EchoOptions(tokens_per_second=500)
    async with several(tmp_path, 2, 1, options=options, slots=1) as made, AsyncClient(made.endpoint) as client:
        first = asyncio.create_task(client.generate("echo", "a b", max_new_tokens=100))
        second = asyncio.create_task(client.generate("echo", "c d", max_new_tokens=10))
        await asyncio.sleep(0.05)
        client._connection._leave()
        assert (await first).text == words("a b", 100)
        assert (await second).text == words("c d", 10)


async def test_clients_of_two_controllers_share_a_worker_s_slots(tmp_path: Path) -> None:
    """The one that asks for ten times as much does not keep the other from its part; how much exactly is up to the machine."""
    options = EchoOptions(tokens_per_second=400)
    async with several(tmp_path, 2, 1, options=options, slots=4) as made:
        done = [0, 0]
        async with (
            AsyncClient(made.controllers[0].endpoints[0]) as few,
            AsyncClient(made.controllers[1].endpoints[0]) as many,
        ):
            end = asyncio.get_running_loop().time() + 3

            async def ask(number: int, client: AsyncClient) -> None:
                while asyncio.get_running_loop().time() < end:
                    await client.generate("echo", "a b", max_new_tokens=8)
                    done[number] += 1

            await asyncio.gather(*(ask(0, few) for _ in range(8)), *(ask(1, many) for _ in range(80)))
        assert min(done) >= 0.5 * max(done)


async def test_two_endpoints_of_one_controller_are_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESOLVE_MS", 50)
    endpoints = tuple(f"ipc://{tmp_path}/{number}.sock" for number in range(2))
    settings = ControllerConfig(endpoints=endpoints, broker=BrokerConfig(recovery_ms=0))
    log: list[str] = []
    async with Controller(settings) as controller:
        hosts = Fabric(",".join(endpoints), controller)
        service = await hosts.add_worker("w0", log=lambda event, **_: log.append(event))
        async with asyncio.timeout(10):
            while len(list(service._sessions)) > 1:
                await asyncio.sleep(0.005)
        assert list(controller.broker.registry.workers) == ["w0"]
        assert "refused" not in log
        async with AsyncClient(hosts.endpoint) as client:
            assert (await client.generate("echo", "a b", max_new_tokens=2)).text == "a b "
        # The next one is at the endpoint alone that was not needed: it is looked for again.
        assert service._links is not None
        (used,) = service._links._all
        (left,) = set(endpoints) - {used}
    async with Controller(ControllerConfig(endpoints=(left,), broker=BrokerConfig(recovery_ms=0))) as controller:
        async with asyncio.timeout(10):
            while "w0" not in controller.broker.registry.workers:
                await asyncio.sleep(0.005)
        await hosts.remove_worker("w0")


async def test_a_worker_registers_at_all_addresses_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controllers come and go with the name's addresses."""
    loop = asyncio.get_running_loop()
    addresses = ["127.0.0.2", "127.0.0.3"]
    look_up = loop.getaddrinfo

    async def found(host: str, port: int, **options: Any) -> Any:
        if host != "controllers.test":
            return await look_up(host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(loop, "getaddrinfo", found)
    monkeypatch.setattr(limits, "RESOLVE_MS", 50)
    broker = BrokerConfig(recovery_ms=0)
    async with contextlib.AsyncExitStack() as stack:
        port = 0
        made: list[Controller] = []
        for number in (2, 3, 4):
            config = ControllerConfig(endpoints=(f"tcp://127.0.0.{number}:{port or '*'}",), broker=broker)
            made.append(await stack.enter_async_context(Controller(config)))
            port = int(made[0].endpoints[0].rpartition(":")[2])
        hosts = Fabric(f"tcp://controllers.test:{port}", made[0])
        await hosts.add_worker("w0")

        async def registered(*numbers: int) -> None:
            async with asyncio.timeout(10):
                while [n for n, it in enumerate(made) if it.broker.registry.workers] != list(numbers):
                    await asyncio.sleep(0.005)

        await registered(0, 1)
        addresses.append("127.0.0.4")
        await registered(0, 1, 2)
        async with AsyncClient(hosts.endpoint) as client:
            stream = client.stream("echo", "a b", max_new_tokens=4)
            assert "".join([delta.text async for delta in stream]) == "a b a b "
            assert client._connection.session.several
        links = hosts.services["w0"]._links
        assert links is not None
        addresses.remove("127.0.0.2")
        await made[0].__aexit__()
        made = made[1:]
        await registered(0, 1)
        async with asyncio.timeout(10):
            while len(links._all) > 2:
                await asyncio.sleep(0.005)
        await hosts.remove_worker("w0")


@pytest.mark.parametrize("transport", ["loop", "libzmq"])
async def test_a_client_with_either_driver_goes_to_the_next(tmp_path: Path, transport: str) -> None:
    options = EchoOptions(tokens_per_second=500)
    async with (
        several(tmp_path, 2, 1, options=options, transport=transport) as made,
        AsyncClient(made.endpoint, transport=transport) as client,
    ):
        stream = client.stream("echo", "a b", max_new_tokens=300)
        text, home = "", None
        async for delta in stream:
            text += delta.text
            if home is None and len(text) > 20:
                home = made.home(client)
                made.controllers.remove(home)
                await home.__aexit__()
        assert text == words("a b", 300)
        assert client.figures()["failovers"] == 0


async def test_a_controller_that_drains_is_left_for_another(tmp_path: Path) -> None:
    options = EchoOptions(tokens_per_second=500)
    async with several(tmp_path, 2, 1, options=options) as made, AsyncClient(made.endpoint) as client:
        stream = client.stream("echo", "a b", max_new_tokens=200)
        await anext(aiter(stream))
        home = made.home(client)
        draining = asyncio.create_task(home.drain(20_000))
        await asyncio.sleep(0)
        assert (await client.generate("echo", "c d", max_new_tokens=4)).text == "c d c d "
        assert made.home(client) is not home
        # What ran by it has gone along, so it has nothing to wait for.
        assert await draining
        assert "".join([delta.text async for delta in stream]) == words("b a", 199)
        assert client.figures()["gaps"] == client.figures()["repeated_chunks"] == 0
        # Where all of them drain, there is nobody to go to.
        for controller in made.controllers:
            controller.broker.drain(0)
        with pytest.raises(NoWorkerError):
            await client.generate("echo", "c d", max_new_tokens=4)
