"""FastChat's own protocol: JSON documents that end with a zero byte, each with the whole text so far."""

from __future__ import annotations

import aiohttp
import orjson

from bench.adapters import Arrived

_HEADERS = {"content-type": "application/json"}


class FastChatAdapter:
    """POST /worker_generate_stream, at the controller or at a worker."""

    async def open(self, target: str) -> None:
        self._url = f"{target}/worker_generate_stream"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None))

    async def ask(self, prompt: str, tokens: int, arrived: Arrived) -> None:
        body = orjson.dumps({"model": "echo", "prompt": prompt, "max_new_tokens": tokens})
        rest, seen = b"", 0
        async with self._session.post(self._url, data=body, headers=_HEADERS) as response:
            async for data in response.content.iter_any():
                *documents, rest = (rest + data).split(b"\0")
                for document in documents:
                    answer = orjson.loads(document)
                    if answer["error_code"]:
                        raise RuntimeError(answer["text"])
                    count = answer["usage"]["completion_tokens"]
                    if count > seen:
                        arrived(count - seen)
                        seen = count

    async def close(self) -> None:
        await self._session.close()


make = FastChatAdapter
