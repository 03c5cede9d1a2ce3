"""Limits of the fabric's keys, as callers of the gateway meet them: over real sockets, from HTTP to the controller's keyring."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.backends import Slow
from tests.keys import credentials, guarded, make_keys
from zfabric.cli.gateway import Link
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.keys import ApiKey, KeyTable
from zfabric.gateway.server import Gateway

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
KEYRING = """
[gpu]
role = "worker"
key = "gpu.key"
[desk]
role = "client"
key = "desk.key"
group = "shop"
[till]
role = "client"
key = "till.key"
group = "shop"
[metered]
role = "client"
key = "metered.key"
tokens_per_minute = 6
[seldom]
role = "client"
key = "seldom.key"
requests_per_second = 0.01
[short]
role = "client"
key = "short.key"
models = ["slow"]
prompt_bytes = 300
[groups.shop]
requests_in_flight = 1
"""
CALLERS = ("desk", "till", "metered", "seldom", "short")


class Door:
    """A gateway, and what callers with its keys are told."""

    def __init__(self, web: httpx.AsyncClient, slow: Slow) -> None:
        self.web = web
        self.slow = slow

    async def ask(self, caller: str, path: str = "/v1/chat/completions", **asked: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer sk-{caller}"}
        return await self.web.post(path, json={**CHAT, **asked}, headers=headers)


@pytest.fixture
async def door(ipc: str, tmp_path: Path) -> AsyncIterator[Door]:
    """Each caller has a key of the gateway, and by it one of the fabric."""
    keys = make_keys(tmp_path, ("controller", "gpu", *CALLERS), KEYRING)
    table = KeyTable(
        {name: ApiKey(key=f"sk-{name}", fabric_key=str(keys / f"{name}.key_secret")) for name in CALLERS}
        | {"no-slow": ApiKey(key="sk-no-slow", models=["echo"], fabric_key=str(keys / "desk.key_secret"))}
    )
    slow = Slow()
    async with contextlib.AsyncExitStack() as held:
        made = await held.enter_async_context(guarded(ipc, keys))
        await made.add_worker("gpu-1", slow, credentials=credentials(keys, "gpu"))
        link = Link(
            endpoint=made.endpoint, key=keys / "desk.key_secret", controller_key=keys / "controller.key", transport=None
        )
        opened = await held.enter_async_context(Gateway(GatewayConfig(port=0, keys=table), link.connect))
        web = await held.enter_async_context(httpx.AsyncClient(base_url=opened.url, timeout=30))
        yield Door(web, slow)


def check_limited(refused: httpx.Response, least_s: int, most_s: int) -> None:
    """It is refused for a limit, and told when there is more."""
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert least_s <= int(refused.headers["retry-after"]) <= most_s


async def test_two_keys_of_the_gateway_share_the_limit_of_their_group(door: Door) -> None:
    running = asyncio.create_task(door.ask("desk", model="slow"))
    await door.slow.begun.wait()
    for caller in ("desk", "till"):
        check_limited(await door.ask(caller), 1, 1)
    # A stream that may not begin is no stream.
    check_limited(await door.ask("till", stream=True), 1, 1)
    door.slow.go_on.set()
    assert (await running).status_code == 200
    assert (await door.ask("till")).status_code == 200


async def test_tokens_beyond_their_limit_are_waited_for(door: Door) -> None:
    """The controller counts what was made: 100 of 6 a minute are 940 s of it, and 10 for the next one."""
    assert (await door.ask("metered", max_tokens=100)).json()["usage"]["completion_tokens"] == 100
    check_limited(await door.ask("metered"), 800, 950)
    told = await door.ask("metered", "/v1/messages", max_tokens=1)
    assert (told.status_code, told.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 800 <= int(told.headers["retry-after"]) <= 950
    assert (await door.ask("desk")).status_code == 200


async def test_requests_beyond_their_rate_are_waited_for(door: Door) -> None:
    assert (await door.ask("seldom")).status_code == 200
    check_limited(await door.ask("seldom"), 50, 100)


async def test_a_model_that_a_key_has_nothing_to_do_with(door: Door) -> None:
    """The fabric says that it may not, and the gateway's own list that there is none."""
    told = await door.ask("short")
    assert (told.status_code, told.json()["error"]["code"]) == (403, "permission_denied")
    told = await door.ask("no-slow", model="slow")
    assert (told.status_code, told.json()["error"]["code"]) == (404, "model_not_found")
    assert "retry-after" not in told.headers


async def test_a_prompt_that_is_too_large_for_its_key(door: Door) -> None:
    told = await door.ask("short", model="slow", messages=[{"role": "user", "content": "word " * 200}])
    assert (told.status_code, told.json()["error"]["code"]) == (413, "too_large")
