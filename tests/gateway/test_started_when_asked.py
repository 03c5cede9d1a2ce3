"""A model that has a rule for its workers and none yet, as programs see it: by the library, and through the gateway."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.core.controller.scaling import Rule
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.server import Gateway


async def is_waiting(client: AsyncClient, count: int) -> list[str]:
    """Why so many requests wait, as soon as they do."""
    async with asyncio.timeout(20):
        while (await client.status()).queued < count:
            await asyncio.sleep(0.005)
    return [row.why for row in (await client.requests()).rows]


async def test_requests_wait_for_the_first_worker_and_are_listed_with_the_reason(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(ipc) as client:
        made.controller.set_rules([Rule(model="echo", min=0, max=2)])
        config = GatewayConfig(port=0, drain_ms=5_000)
        async with (
            Gateway(config, lambda _: AsyncClient(ipc), lambda *_, **__: None) as gateway,
            AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as openai,
        ):
            assert [model.id async for model in openai.models.list()] == ["echo"]
            by_http = asyncio.create_task(
                openai.chat.completions.create(
                    model="echo", messages=[{"role": "user", "content": "one two"}], max_tokens=2
                )
            )
            by_library = asyncio.create_task(client.generate("echo", "three four", max_new_tokens=2))
            [why] = set(await is_waiting(client, 2))
            assert why == "no worker serves 'echo' now, and its rule has one started; it waits for 600 s at the most"
            assert (await client.model_details("echo")).queued == 2
            await made.add_worker("w")
            assert ((await by_http).choices[0].message.content or "").strip() == "one two"
            assert (await by_library).text.strip() == "three four"
            [row] = await client.scaling()
            assert (row.model, row.ready, row.waiting) == ("echo", 1, 0)
