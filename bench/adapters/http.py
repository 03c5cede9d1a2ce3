"""Server-sent events over HTTP/1.1: aiohttp with its C parser, kept-alive connections, orjson for each event."""

from __future__ import annotations

import aiohttp
import orjson

from bench.adapters import Arrived

_HEADERS = {"content-type": "application/json"}


class HttpAdapter:
    """POST /v1/completions, streamed. Events are cut out of whatever a read brings: no line by line awaiting."""

    async def open(self, target: str) -> None:
        self._url = f"{target}/v1/completions"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None))

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        body = orjson.dumps({"model": "echo", "prompt": prompt, "max_tokens": tokens, "stream": True})
        rest = b""
        async with self._session.post(self._url, data=body, headers=_HEADERS) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                count = 0
                for event in events:
                    if event[6:7] == b"{":
                        count += bool(orjson.loads(event[6:])["choices"][0].get("text"))
                if count:
                    arrived(count)

    async def close(self) -> None:
        await self._session.close()


make = HttpAdapter
