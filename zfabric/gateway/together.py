"""Several requests to the fabric for one of HTTP: all of them, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from zfabric.client.aio import AsyncClient
from zfabric.errors import UnsupportedOperationError

T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What each of them gives, in their order. When one fails, or this call is cancelled, the others are cancelled.

    Raises:
        Exception: What the first that failed raised.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def with_count(
    work: Coroutine[Any, Any, T], client: AsyncClient, model: str, inputs: Iterable[str | list[int]]
) -> tuple[T, int]:
    """What a request gives, and how many tokens its inputs have: vectors and scores come without counts in the fabric.

    Raises:
        FabricError: The request failed, or the model could not be asked for the count.
    """
    counting = asyncio.ensure_future(_count(client, model, inputs))
    try:
        # What is wrong with the request is told by the request itself.
        return await work, await counting
    finally:
        counting.cancel()
        await asyncio.gather(counting, return_exceptions=True)


async def _count(client: AsyncClient, model: str, inputs: Iterable[str | list[int]]) -> int:
    """Tokens of all inputs together; texts count 0 for a model that counts none."""
    given = list(inputs)
    tokens = sum(len(one) for one in given if not isinstance(one, str))
    try:
        return tokens + sum(
            await together(client.count_tokens(model, one) for one in given if one and isinstance(one, str))
        )
    except UnsupportedOperationError:
        return tokens
