"""NATS: a request with a reply inbox, a message a token, the last one empty."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats

from bench.adapters import Arrived


class NatsAdapter:
    """One wildcard subscription for all answers, as the library itself does for requests."""

    async def open(self, target: str) -> None:
        self._nats = await nats.connect(target, pending_size=64 << 20)
        self._inbox = self._nats.new_inbox()
        self._waiting: dict[str, tuple[Arrived, asyncio.Future[None]]] = {}
        self._pack, self._unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
        self._next = 0
        await self._nats.subscribe(f"{self._inbox}.*", cb=self._received)

    async def _received(self, message: Any) -> None:
        name = message.subject.rpartition(".")[2]
        arrived, done = self._waiting[name]
        if not message.data:
            done.set_result(None)
            return
        self._unpack(message.data)
        arrived(1)

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        self._next += 1
        name = str(self._next)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[name] = (arrived, done)
        await self._nats.publish("generate", self._pack([prompt, tokens]), reply=f"{self._inbox}.{name}")
        try:
            await done
        finally:
            del self._waiting[name]

    async def close(self) -> None:
        await self._nats.close()


make = NatsAdapter
