"""zfabric's own client."""

from __future__ import annotations

from bench.adapters import Arrived
from zfabric import AsyncClient


class FabricAdapter:
    """`AsyncClient.stream`, read as the README shows. Greedy, so that an answer can go on at another worker."""

    async def open(self, target: str) -> None:
        self._client = AsyncClient(target)
        self._client.open()
        await self._client.status()

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        # Whoever leaves the block gives the answer up, at once.
        async with self._client.stream("echo", prompt, max_new_tokens=tokens, temperature=0.0) as stream:
            async for delta in stream:
                arrived(len(delta.token_ids))

    async def close(self) -> None:
        await self._client.close()


make = FabricAdapter
