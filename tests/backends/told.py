"""What a controller is told of caches, and whether it is what an engine finds in its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fabric import Fabric
from zfabric import AsyncClient
from zfabric.core.controller.placement import Placement
from zfabric.core.controller.prefixes import hashes_of
from zfabric.limits import PREFIX_BLOCK_TOKENS, PREFIX_HASH_BYTES
from zfabric.wire.load import CachedBlocks
from zfabric.wire.prefixes import token_hashes

GREEDY: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0, "prefix_hints": True}


class Told:
    """Listens to what the controller is told.

    Args:
        model: Whose prompts they are.
        unit: Tokens of a block of the engine's.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, made: Fabric, client: AsyncClient, model: str, unit: int
    ) -> None:
        self.made, self.client, self.model, self.unit = made, client, model, unit
        self.heard: list[CachedBlocks] = []
        take = Placement.told

        def noting(placement: Placement, hosts: Any, changes: Any) -> None:
            take(placement, hosts, changes)
            self.heard.extend(changes)

        monkeypatch.setattr(Placement, "told", noting)

    def prompt(self, number: int, blocks: int) -> list[int]:
        """Of so many of the engine's blocks; no two numbers share any."""
        return [3 + number] * (self.unit * blocks)

    def believed(self, tokens: list[int]) -> int:
        """How many tokens of a prompt the controller takes to be cached."""
        index = self.made.controller.broker.registry.placement.index
        return max(index.matched(hashes_of(token_hashes(tokens))).values(), default=0) * PREFIX_BLOCK_TOKENS

    async def ask(self, tokens: list[int]) -> int:
        """Have a prompt and one token more computed. Returns how many tokens the engine had."""
        answer = await self.client.generate(self.model, prompt_token_ids=[*tokens, 1], **GREEDY)
        return answer.usage.cached_tokens or 0

    async def settle(self, number: int) -> None:
        """Wait until the controller knows of all that has happened: what a short prompt stores now is told after it."""
        tokens = self.prompt(number, 1)
        await self.ask(tokens)
        first = token_hashes(tokens)[:PREFIX_HASH_BYTES]
        async with asyncio.timeout(60):
            while not any(first in item.stored for item in self.heard):
                await asyncio.sleep(0.01)

    async def compare(self) -> None:
        """What is believed is what the engine finds, also of prompts that were thrown out in part or whole since they were
        computed: the cache has room for two of these and some more."""
        found = set()
        for turn, number in enumerate((0, 1, 2, 0, 3, 3, 1, 2, 0)):
            tokens = self.prompt(number, 10)
            believed = self.believed(tokens)
            assert await self.ask(tokens) == believed
            found.add(believed)
            await self.settle(40 + turn)
        assert {0, 10 * self.unit} <= found
