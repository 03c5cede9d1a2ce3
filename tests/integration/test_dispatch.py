"""Who gets what, with real sockets: broken policies, names that move, workers that change what they serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.config import ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.candidates import Host
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.dispatch import POLICIES, Ask, register_policy
from zfabric.errors import UnknownModelError
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService


def broken(ask: Ask) -> Host:
    raise RuntimeError("out of ideas")


async def test_a_broken_policy_is_logged_and_serves_all_the_same(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "broken", broken)
    register_policy("broken", broken)
    logged: list[tuple[str, dict[str, Any]]] = []
    config = ControllerConfig(endpoints=(endpoint,), broker=BrokerConfig(policy="broken", recovery_ms=0))
    async with Controller(config, log=lambda event, **fields: logged.append((event, fields))) as controller:
        ready = asyncio.Event()
        service = WorkerService(
            [EchoWorker()], WorkerConfig(endpoint=controller.endpoints[0], name="w"), on_ready=lambda _: ready.set()
        )
        serving = asyncio.create_task(service.run())
        await ready.wait()
        async with AsyncClient(controller.endpoints[0]) as client:
            for _ in range(20):
                assert (await client.generate("echo", "a b", max_new_tokens=2)).text == "a b "
            assert (await client.status()).policy_failures == 20
        await service.drain()
        await serving
        assert not controller.broker.in_flight
    failed = [fields for event, fields in logged if event == "policy_failed"]
    assert failed == [{"what": "policy 'broken' raised RuntimeError: out of ideas", "times": 1}]


async def test_an_alias_moves_while_it_is_used(endpoint: str) -> None:
    async with fabric(endpoint) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("blue", EchoWorker(EchoOptions(model_names=("v1", "chat"))))
        assert (await client.generate("chat", "x", max_new_tokens=1)).worker == "blue"
        await made.add_worker("green", EchoWorker(EchoOptions(model_names=("v2", "chat"))))
        assert (await client.generate("chat", "x", max_new_tokens=1)).worker == "green"
        assert {row.name: row.aliases for row in await client.models()} == {"v1": [], "v2": ["chat"]}
        await made.remove_worker("blue")
        assert (await client.generate("chat", "x", max_new_tokens=1)).worker == "green"
        assert (await client.model_details("chat")).name == "v2"
        with pytest.raises(UnknownModelError):
            await client.generate("other", "x", max_new_tokens=1)
