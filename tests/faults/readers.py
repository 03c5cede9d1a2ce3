"""Streams that are read with a clock beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.fabric import words
from tests.faults.conftest import Row
from zfabric import AsyncClient, TokenStream


class Readers:
    """Reads many streams at once and notes when tokens come.

    Args:
        client: Whose streams.
        count: How many.
        tokens: Of each answer.
    """

    def __init__(self, client: AsyncClient, count: int, tokens: int, *, first: int = 0) -> None:
        self._client = client
        self._tokens = tokens
        self._prompts = [f"s{number} x y" for number in range(first, first + count)]
        self.streams: list[TokenStream] = [
            client.stream("echo", prompt, max_new_tokens=tokens, temperature=0.0) for prompt in self._prompts
        ]
        self._arrivals: list[list[float]] = [[] for _ in self.streams]
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(count)]

    async def _read(self, number: int) -> None:
        async for delta in self.streams[number]:
            self._arrivals[number] += [time.perf_counter()] * len(delta.token_ids)

    async def have(self, tokens: int) -> None:
        """Wait until every stream has so many tokens."""
        while any(len(arrivals) < tokens for arrivals in self._arrivals):
            await asyncio.sleep(0.002)

    def served_by(self, worker: str | None) -> list[int]:
        """Streams that a worker serves now."""
        return [number for number, stream in enumerate(self.streams) if stream.worker == worker]

    async def finish(self) -> None:
        """Wait for the end of all. Raises the first error of any."""
        await asyncio.gather(*self._tasks)

    def check(self, row: Row, affected: list[int], fault_at: float) -> None:
        """Compare all texts with the undisturbed ones, and fill in the row."""
        row.requests = len(affected)
        for number, prompt in enumerate(self._prompts):
            row.lost += self.streams[number].text != words(prompt, self._tokens)
        row.doubled = self._client.figures()["repeated_chunks"]
        gaps = [self._next_after(number, fault_at) for number in affected]
        row.recovery_ms = max((gap for gap in gaps if gap is not None), default=None)
        assert row.lost == 0
        assert row.doubled == 0
        for stream in self.streams:
            assert stream.usage is not None
            assert stream.usage.completion_tokens == self._tokens

    def _next_after(self, number: int, moment: float) -> float | None:
        """Milliseconds of silence around a moment: until the first token that followed a pause begun by it."""
        arrivals = self._arrivals[number]
        before = [at for at in arrivals if at <= moment + 0.005]
        after = arrivals[len(before) :]
        return (after[0] - moment) * 1_000 if after else None


async def measured(condition: Callable[[], bool], since: float, limit_s: float = 15.0) -> float:
    """Milliseconds from a moment until a condition holds."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.0005)
    return (time.perf_counter() - since) * 1_000
