"""A client of several controllers in a process of its own: `python -m tests.faults.roaming ENDPOINTS HOME STREAMS TOKENS`.

It goes to the controller at HOME, says "ready" when all of its streams have some tokens there, reads them to their end, and
prints what they were like as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time

from tests.fabric import words
from zfabric import AsyncClient
from zfabric.transport.loop_dealer import LoopDealer

#: Tokens of each stream before the fault.
_BEFORE = 10


def home_of(client: AsyncClient) -> str:
    """The endpoint of the controller that a client is at; "" while it is at none."""
    link = client._connection._link
    assert isinstance(link, LoopDealer)
    return link._peer.where.text if link._peer is not None and client._connection.session.ready else ""


async def go_home(client: AsyncClient, home: str) -> None:
    """Have a client be at this controller."""
    async with asyncio.timeout(20):
        while home_of(client) != home:
            if home_of(client):
                client._connection._leave()
            await asyncio.sleep(0.02)


async def main(endpoints: str, home: str, streams: int, tokens: int) -> None:
    async with AsyncClient(endpoints) as client:
        await go_home(client, home)
        arrivals: list[list[float]] = [[] for _ in range(streams)]

        async def read(number: int) -> bool:
            prompt = f"s{number} x y"
            stream = client.stream("echo", prompt, max_new_tokens=tokens, temperature=0.0)
            async for _ in stream:
                arrivals[number].append(time.monotonic())
            return stream.text == words(prompt, tokens)

        tasks = [asyncio.create_task(read(number)) for number in range(streams)]
        while any(len(times) < _BEFORE for times in arrivals):
            await asyncio.sleep(0.01)
        assert home_of(client) == home
        print("ready", flush=True)
        whole = await asyncio.gather(*tasks)
        gaps = [max(later - at for at, later in itertools.pairwise(times[_BEFORE - 1 :])) for times in arrivals]
        figures = client.figures()
        told = {
            "lost": whole.count(False),
            "doubled": figures["repeated_chunks"],
            "failovers": figures["failovers"],
            "claims": figures["claims"],
            "moved": home_of(client) != home,
            "silence_ms": max(gaps) * 1_000,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
