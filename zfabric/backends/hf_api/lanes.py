"""Connections to one server, each with a client of its own.

A client that holds many connections looks at each of them, with system calls, before every request: with 64 idle ones that
is longer than all the rest of sending it. One that holds a single connection has nothing to look through.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import httpx2

#: A keep-alive connection that idles longer is likely closed by a proxy.
KEEPALIVE_S: Final = 30.0
#: One connection, kept for the next request.
ONE: Final = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_S)


class Lanes:
    """Hands out clients, the last used first, so that those beyond need grow old and are closed.

    Args:
        make: Makes a client, with the limits `ONE`.
        most: Clients in use at a time; whoever comes beyond waits.
    """

    def __init__(self, make: Callable[[], httpx2.AsyncClient], most: int) -> None:
        self._make = make
        self._places = asyncio.Semaphore(most)
        # The first one is made here: it brings imports along, which the first request is not to wait for.
        self._idle: deque[tuple[httpx2.AsyncClient, float]] = deque([(make(), 0.0)])
        self._busy: set[httpx2.AsyncClient] = set()

    @contextlib.asynccontextmanager
    async def lane(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A client for one request. Its response has to be closed before the end."""
        async with self._places:
            client = self._idle.pop()[0] if self._idle else self._make()
            self._busy.add(client)
            try:
                yield client
            finally:
                self._busy.discard(client)
                now_s = asyncio.get_running_loop().time()
                self._idle.append((client, now_s))
                while self._idle[0][1] < now_s - KEEPALIVE_S:
                    await self._idle.popleft()[0].aclose()

    async def close(self) -> None:
        """Close all at once, also those in use."""
        clients = [*self._busy, *(client for client, _ in self._idle)]
        self._idle.clear()
        await asyncio.gather(*(client.aclose() for client in clients))
