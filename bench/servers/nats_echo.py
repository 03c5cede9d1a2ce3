"""A worker on NATS: subscribes to a queue group, publishes a message a token. ``python -m … URL``"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import msgspec
import nats
import uvloop

_RATE = float(os.environ.get("ECHO_TOKENS_PER_SECOND", "0"))
_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode


async def main(url: str) -> None:
    connection = await nats.connect(url, pending_size=64 << 20)
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def answer(message: Any) -> None:
        prompt, tokens = _unpack(message.data)
        messages = [_pack([word + " ", number]) for number, word in enumerate(prompt.split()[:64] or [""])]
        tick = int(loop.time() * _RATE) + 1
        for position in range(tokens):
            if _RATE:
                await asyncio.sleep(max(0.0, (tick + position) / _RATE - loop.time()))
            elif position % 32 == 31:
                await asyncio.sleep(0)
            await connection.publish(message.reply, messages[position % len(messages)])
        await connection.publish(message.reply, b"")

    async def begin(message: Any) -> None:
        task = asyncio.create_task(answer(message))
        running.add(task)
        task.add_done_callback(running.discard)

    await connection.subscribe("generate", queue="workers", cb=begin)
    await connection.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
