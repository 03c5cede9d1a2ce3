"""The engine behind the HTTP routers: a bare ASGI application, no framework, every token an event of its own.

All bytes of an event are made once per word, not per token. Paced, all streams step at common ticks, as one engine's
batch does (``ECHO_TOKENS_PER_SECOND``). ``ECHO_ABORTS`` names a file that gets the time of each disconnect.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_RATE = float(os.environ.get("ECHO_TOKENS_PER_SECOND", "0"))
#: Whether the engine keeps a time of its own.
PACED = _RATE > 0
_ABORTS = os.environ.get("ECHO_ABORTS")
_JSON = [(b"content-type", b"application/json")]
_EVENTS = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
_END = b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}],"usage":{"prompt_tokens":1}}\n\ndata: [DONE]\n\n'
_MODEL = {"id": "echo", "object": "model", "max_model_len": 1_000_000}
_FACTS = {
    "/v1/models": {"object": "list", "data": [_MODEL]},
    "/get_model_info": {"model_path": "echo", "is_generation": True},
    "/model_info": {"model_path": "echo", "is_generation": True},
    "/get_server_info": {"model_path": "echo", "served_model_name": "echo", "max_total_num_tokens": 1_000_000},
    "/server_info": {"model_path": "echo", "served_model_name": "echo", "max_total_num_tokens": 1_000_000},
    "/version": {"version": "0.32.0"},
}


class Pace:
    """The common ticks, as one stream waits for them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick = int(self._loop.time() * _RATE)

    async def step(self) -> None:
        """Wait for the next tick; one that has passed is not waited for."""
        self._tick += 1
        await asyncio.sleep(max(0.0, self._tick / _RATE - self._loop.time()))


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The application."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/v1/completions":
        await _complete(receive, send)
        return
    found = _FACTS.get(scope["path"], {})
    await send({"type": "http.response.start", "status": 200, "headers": _JSON})
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})


async def _complete(receive: Receive, send: Send) -> None:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    request = orjson.loads(b"".join(parts))
    words = request["prompt"].split()[:64] or [""]
    events = [
        b'data: {"choices":[{"index":0,"text":%s,"finish_reason":null}]}\n\n' % orjson.dumps(word + " ")
        for word in words
    ]
    await send(_EVENTS)
    await until_gone(receive, _stream(send, events, int(request["max_tokens"])))


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; where aborts are noted, stop it when the client has gone, and note when."""
    if not _ABORTS:
        await work
        return
    stream = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not stream.done():
        stream.cancel()
        with open(_ABORTS, "a", encoding="ascii") as file:
            file.write(f"{time.monotonic_ns()}\n")
    gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(send: Send, events: list[bytes], tokens: int) -> None:
    count = len(events)
    pace = Pace() if _RATE else None
    for position in range(tokens):
        if pace is not None:
            await pace.step()
        await send({"type": "http.response.body", "body": events[position % count], "more_body": True})
    await send({"type": "http.response.body", "body": _END})
