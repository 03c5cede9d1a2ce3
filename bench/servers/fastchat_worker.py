"""The engine behind FastChat's controller: its worker's HTTP interface as a bare ASGI application.

FastChat's own workers answer with the whole text so far in each document; so does this one. Registration is one POST to
the controller, without heartbeats, which costs FastChat nothing.
"""

from __future__ import annotations

import os
import urllib.request
from typing import Any

import orjson

from bench.servers.asgi_echo import PACED, Pace, Receive, Send, until_gone

_JSON = [(b"content-type", b"application/json")]


def register(controller: str, own: str) -> None:
    """Tell the controller of this worker."""
    status = {"model_names": ["echo"], "speed": 1, "queue_length": 0}
    body = {"worker_name": own, "check_heart_beat": False, "worker_status": status, "multimodal": False}
    request = urllib.request.Request(
        f"{controller}/register_worker", orjson.dumps(body), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=20).read()


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The application."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        return
    if scope["path"] != "/worker_generate_stream":
        status = {"model_names": ["echo"], "speed": 1, "queue_length": 0}
        await send({"type": "http.response.start", "status": 200, "headers": _JSON})
        await send({"type": "http.response.body", "body": orjson.dumps(status)})
        return
    request = orjson.loads((await receive())["body"])
    words = request["prompt"].split() or [""]
    await send({"type": "http.response.start", "status": 200, "headers": _JSON})
    await until_gone(receive, _stream(send, words, int(request["max_new_tokens"])))


async def _stream(send: Send, words: list[str], tokens: int) -> None:
    text = ""
    pace = Pace() if PACED else None
    for position in range(tokens):
        if pace is not None:
            await pace.step()
        text += words[position % len(words)] + " "
        usage = {"prompt_tokens": len(words), "completion_tokens": position + 1}
        document = orjson.dumps({"text": text, "error_code": 0, "usage": usage, "finish_reason": None}) + b"\0"
        await send({"type": "http.response.body", "body": document, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


if "FASTCHAT_CONTROLLER" in os.environ:
    register(os.environ["FASTCHAT_CONTROLLER"], os.environ["FASTCHAT_OWN"])
