"""One client of the fabric, and the one task that reads all of its streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

from zfabric.client.aio import AsyncClient
from zfabric.client.reader import AnswerReader, AnswerStream
from zfabric.errors import BackendError, ClosedError, FabricError
from zfabric.limits import MODELS_KNOWN_MS, READY_TIMEOUT_MS
from zfabric.wire.payloads import Delta
from zfabric.wire.status import ModelStatus


class Sink(Protocol):
    """Who is told what arrives, in the task that reads: it must not wait."""

    def arrived(self, stream: AnswerStream, delta: Delta) -> None: ...
    def ended(self, stream: AnswerStream) -> None: ...
    def broke(self, error: FabricError) -> None: ...


class FabricClient:
    """A client, for all requests of one identity.

    Args:
        client: Not open yet.
        log: Called with an event and its fields.
        prefix_hints: Send hashes of prompts along.
    """

    def __init__(self, client: AsyncClient, log: Callable[..., Any], *, prefix_hints: bool = False) -> None:
        self.client = client
        self._prefix_hints = prefix_hints
        self._log = log
        self._sinks: dict[AnswerStream, Sink] = {}
        self._reader: AnswerReader | None = None
        self._task: asyncio.Task[None] | None = None
        #: Models by all of their names, until when they hold, and who asks for them anew.
        self._models: dict[str, ModelStatus] = {}
        self._models_until_s = 0.0
        self._asking = asyncio.Lock()

    def open(self) -> None:
        """Start connecting and reading. Raises: FabricError, as `AsyncClient.open`."""
        self.client.open()
        self._reader = self.client.reader()
        self._task = asyncio.create_task(self._read(self._reader), name="gateway-reader")

    async def close(self) -> None:
        """End all requests."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.client.close()

    def stream(self, sink: Sink, model: str, prompt: str | None, options: dict[str, Any]) -> AnswerStream:
        """Ask for text; `sink` is told of it. Raises: FabricError: The request can never be sent."""
        if self._reader is None:
            raise ClosedError("the client of the fabric is not open")
        stream = self._reader.stream(model, prompt, prefix_hints=self._prefix_hints, **options)
        self._sinks[stream] = sink
        return stream

    async def model(self, name: str) -> ModelStatus | None:
        """A model as of MODELS_KNOWN_MS ago at most; None where it is not known."""
        if time.monotonic() >= self._models_until_s:
            async with self._asking:
                if time.monotonic() >= self._models_until_s:
                    await self._ask_models()
        return self._models.get(name)

    async def _ask_models(self) -> None:
        # What is wrong is told to the caller by its request itself.
        with contextlib.suppress(FabricError):
            found = await self.client.models(timeout=READY_TIMEOUT_MS / 1_000)
            self._models = {name: one for one in found for name in (one.name, *one.aliases)}
        self._models_until_s = time.monotonic() + MODELS_KNOWN_MS / 1_000

    async def _read(self, reader: AnswerReader) -> None:
        while True:
            try:
                for stream, delta in await reader.read():
                    self._tell(stream, delta)
            except ClosedError:
                return
            except Exception as error:  # noqa: BLE001 — nobody else reads: without this task every caller would wait for ever
                self._log("internal_error", exc_info=error)
                for stream in list(self._sinks):
                    self._break(stream, error)

    def _tell(self, stream: AnswerStream, delta: Delta | None) -> None:
        sink = self._sinks.get(stream)
        if sink is None:
            return
        try:
            if delta is not None:
                sink.arrived(stream, delta)
            else:
                del self._sinks[stream]
                sink.ended(stream)
        except Exception as error:  # noqa: BLE001 — one caller's answer must not end all others'
            self._log("internal_error", request=stream.request_id, exc_info=error)
            self._sinks[stream] = sink
            self._break(stream, error)

    def _break(self, stream: AnswerStream, error: Exception) -> None:
        """End an answer that this program failed at."""
        sink = self._sinks.pop(stream)
        with contextlib.suppress(FabricError):
            stream.cancel()
        sink.broke(BackendError(f"the gateway failed: {type(error).__name__}: {error}"))
