"""Streams that run while something happens to a fleet, and have to end with what they would have said."""

from __future__ import annotations

import asyncio

from tests.ray.cluster import until
from zfabric import AsyncClient
from zfabric.client.results import Completion

PROMPT = "one two three four"
_TOKENS = 160


class Load:
    """Streams of an echo backend, of 4 s each."""

    def __init__(self, answers: list[asyncio.Task[Completion]]) -> None:
        self._answers = answers

    @classmethod
    async def begin(cls, client: AsyncClient, count: int) -> Load:
        """Start them, and return when all of them run."""
        made = [asyncio.create_task(client.generate("echo", PROMPT, max_new_tokens=_TOKENS)) for _ in range(count)]

        async def all_run() -> bool:
            return (await client.status()).in_flight == count

        await until(all_run)
        return cls(made)

    async def end(self) -> None:
        """Wait for all of them: none was lost, and nothing is missing or twice in any."""
        texts = [answer.text for answer in await asyncio.gather(*self._answers)]
        assert texts == [f"{PROMPT} " * (_TOKENS // 4)] * len(texts)
