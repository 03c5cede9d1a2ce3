"""Many inputs as several calls: so many at the same time, of as many inputs as the server takes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from zfabric.backends.hf_api.channel import Channel
from zfabric.errors import TooLargeError

T = TypeVar("T")
R = TypeVar("R")

#: How Text Embeddings Inference tells its limit (`max_client_batch_size`) beside the status 413.
_LIMIT: Final = re.compile(r"maximum allowed batch size\D*(\d+)")


async def in_batches(
    channel: Channel, inputs: Sequence[T], call: Callable[[Sequence[T]], Awaitable[list[R]]]
) -> list[R]:
    """What `call` gives for all inputs, in their order. If one batch fails, the others are cancelled.

    A batch that the server finds too large is split, and none that large is sent again.

    Args:
        call: Asks for one batch; a result for each of its inputs.

    Raises:
        FabricError: What the upstream answered; TooLargeError for a single input.
    """
    places = asyncio.Semaphore(channel.upstream.parallel)

    async def one(batch: Sequence[T]) -> list[R]:
        limit = channel.batch_size
        if len(batch) <= limit:
            try:
                async with places:
                    return await call(batch)
            except TooLargeError as error:
                if len(batch) == 1:
                    raise
                told = _LIMIT.search(error.message)
                limit = min(max(1, int(told[1]) if told else 0), len(batch) - 1) if told else -(-len(batch) // 2)
                channel.batch_size = min(channel.batch_size, limit)
        parts = [await one(batch[start : start + limit]) for start in range(0, len(batch), limit)]
        return [result for part in parts for result in part]

    size = channel.batch_size
    tasks = [asyncio.create_task(one(inputs[start : start + size])) for start in range(0, len(inputs), size)]
    try:
        return [result for part in await asyncio.gather(*tasks) for result in part]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
