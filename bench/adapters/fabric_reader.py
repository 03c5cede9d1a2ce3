"""zfabric's own client, all of its streams read by one task: how a gateway or a trainer uses it."""

from __future__ import annotations

import asyncio

from bench.adapters import Arrived
from zfabric import AnswerReader, AnswerStream, AsyncClient


class FabricReaderAdapter:
    """`AsyncClient.reader`. Greedy, so that an answer can go on at another worker."""

    def __init__(self) -> None:
        self._waiting: dict[AnswerStream, tuple[Arrived, asyncio.Future[None]]] = {}

    async def open(self, target: str) -> None:
        self._client = AsyncClient(target)
        self._client.open()
        await self._client.status()
        self._reader = self._client.reader()
        self._reading = asyncio.create_task(self._read(self._reader))

    async def _read(self, reader: AnswerReader) -> None:
        waiting = self._waiting
        while True:
            for stream, delta in await reader.read():
                if delta is not None:
                    waiting[stream][0](len(delta.token_ids))
                    continue
                _, done = waiting.pop(stream)
                if not done.done():
                    done.set_result(None)

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        stream = self._reader.stream("echo", prompt, max_new_tokens=tokens, temperature=0.0)
        done = asyncio.get_running_loop().create_future()
        self._waiting[stream] = arrived, done
        try:
            await done
        finally:
            stream.cancel()
        stream.completion()

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._client.close()


make = FabricReaderAdapter
