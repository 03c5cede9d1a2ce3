"""A server that fails in all ways a network can: each connection's request is answered by the next script, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.wire.payloads import Delta, GenerateRequest
from zfabric.wire.sampling import SamplingParams

Script = Callable[["Asked"], Awaitable[None]]
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@dataclass
class Asked:
    """One request as it came, and the way to answer it."""

    head: str
    body: Any
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *pieces: bytes) -> None:
        """Each piece as a write of its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0.001)

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65_536):
                pass


@dataclass
class FaultyServer:
    """Scripts are used up in order; the last one stays. `keep` is for those whose answers leave a connection open."""

    url: str = ""
    keep: bool = False
    connections: int = 0
    scripts: list[Script] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
            while self.keep:
                await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(x.partition(":")[2]) for x in head.splitlines() if x.lower().startswith("content-l")), 0)
        body = await reader.readexactly(length)
        asked = Asked(head, json.loads(body) if body else None, reader, writer)
        self.asked.append(asked)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        await script(asked)


@contextlib.asynccontextmanager
async def faulty(*scripts: Script, keep: bool = False) -> AsyncIterator[FaultyServer]:
    """The server on a free port."""
    made = FaultyServer(scripts=list(scripts), keep=keep)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, limit=2**20)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        for asked in made.asked:
            asked.writer.close()
        async with asyncio.timeout(10):
            await asyncio.gather(*made.tasks)


def chat_event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One event of chat completions."""
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def answer(*pieces: bytes) -> Script:
    """A script that sends these and closes."""

    async def script(asked: Asked) -> None:
        await asked.send(*pieces)

    return script


def status(code: int, body: str = "", **headers: str) -> Script:
    """A script that answers with a status."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{lines}\r\n"
    return answer(head.encode() + body.encode())


def usual(text: str = "fine") -> Script:
    """A script that answers as a good server does."""
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    pieces = [chat_event(text), chat_event(finish="stop"), chat_event(usage=usage, choices=[]), b"data: [DONE]\n\n"]
    return answer(EVENTS, *pieces)


class Announced:
    """A sink that notes what the worker announces."""

    def __init__(self) -> None:
        self.models: list[list[str]] = []
        self.changed = asyncio.Event()

    def emit(self, step: Any) -> None:
        raise AssertionError(step)

    def emit_columns(self, *step: Any) -> None:
        raise AssertionError(step)

    def emit_columns_threadsafe(self, *step: Any) -> None:
        raise AssertionError(step)

    def fail(self, request_id: str, error: Any) -> None:
        raise AssertionError(error)

    def emit_threadsafe(self, step: Any) -> None:
        raise AssertionError(step)

    def fail_threadsafe(self, request_id: str, error: Any) -> None:
        raise AssertionError(error)

    def engine_died(self, error: Any) -> None:
        raise AssertionError(error)

    def log(self, event: str, **fields: Any) -> None:
        raise AssertionError(event)

    def cache_changed_threadsafe(self, model: str, *changes: Any, **values: Any) -> None:
        raise AssertionError(changes)

    def models_changed(self, models: Any) -> None:
        self.models.append([model.name for model in models])
        self.changed.set()


def write_models(path: Path, url: str, **keys: Any) -> Path:
    """A models file of one model, «m»."""
    path.write_text(json.dumps({"models": {"m": {"base_url": url, **keys}}}))
    return path


@contextlib.asynccontextmanager
async def api_worker(directory: Path, url: str, **keys: Any) -> AsyncIterator[HuggingfaceApiWorker]:
    """A loaded worker of one model, «m»."""
    worker = HuggingfaceApiWorker(HuggingfaceApiOptions(models=write_models(directory / "models.json", url, **keys)))
    worker.steps = Announced()
    await worker.load()
    try:
        yield worker
    finally:
        await worker.close()


async def ask(worker: HuggingfaceApiWorker, prompt: str | None = "hi", **more: Any) -> list[Delta]:
    """All deltas of one answer."""
    fields = {key: more.pop(key) for key in list(more) if key in GenerateRequest.__struct_fields__}
    request = GenerateRequest(prompt=prompt, model="m", sampling=SamplingParams(**more), **fields)
    return [delta async for delta in worker.generate(request)]
