"""A worker service on the test's own loop whose controller is the test: no socket lies between."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest

from zfabric import BaseModelWorker
from zfabric.limits import FRAME_BYTES_MAX
from zfabric.transport.links import DealerReceiver
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, Outcome
from zfabric.wire.flow import Abort
from zfabric.wire.load import Load
from zfabric.wire.messages import Dispatch, End, Welcome, WorkerHello
from zfabric.wire.payloads import AnyRequest, GenerateRequest, OperateRequest
from zfabric.wire.tasks import EmbedRequest
from zfabric.worker import links as links_module
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import WorkerService

INSTANCE = 9


class BareWorker:
    """The service, and what it said."""

    def __init__(self, *backends: BaseModelWorker, **config: Any) -> None:
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.ready = asyncio.Event()
        self.service = WorkerService(
            backends,
            WorkerConfig(endpoint="ipc:///nowhere", name="w", credentials=None, **config),
            log=lambda event, **fields: self.log.append((event, fields)),
            on_ready=lambda _: self.ready.set(),
        )
        self.chunks: list[Chunk] = []
        self.ends: dict[int, tuple[End, Outcome]] = {}
        self.hellos: list[WorkerHello] = []
        self.loads: list[Load] = []
        self.beat_ms = 20
        self._heard = asyncio.Event()
        self._receiver: DealerReceiver | None = None

    # ── the link's side ─────────────────────────────────────────────────────────────────────────────────────────────

    def link(
        self,
        endpoint: str,
        receiver: DealerReceiver,
        rng: random.Random,
        credentials: object = None,
        transport: str | None = None,
        spin_us: int | None = None,
    ) -> BareWorker:
        """Called as `open_dealer`."""
        self._receiver = receiver

        def up() -> None:
            receiver.link_up()
            receiver.link_idle()

        asyncio.get_running_loop().call_soon(up)
        return self

    def send_all(self, messages: Iterable[codec.Frames]) -> None:
        for header, body in messages:
            if header[0] == kinds.CHUNKS:
                self.chunks += codec.unpack_chunks(header).rows()
            elif header[0] == kinds.ENDS:
                content = codec.unpack_ends_body(body)
                self.chunks += content.chunks.rows()
                for end, outcome in zip(codec.unpack_envelope(header).ends, content.outcomes, strict=True):
                    assert end.request not in self.ends, "a second terminal"
                    self.ends[end.request] = (end, outcome)
            else:
                self._control(codec.unpack_control(header))
        self._heard.set()

    def _control(self, message: object) -> None:
        if isinstance(message, WorkerHello):
            self.hellos.append(message)
            if len(self.hellos) == 1:
                welcome = Welcome(
                    version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=1, token=b"t", beat_ms=self.beat_ms,
                    lease_ms=3_000, frame_bytes_max=FRAME_BYTES_MAX,
                )  # fmt: skip
                asyncio.get_running_loop().call_soon(self.say, codec.pack(welcome))
        elif isinstance(message, Load):
            self.loads.append(message)

    def close(self) -> None:
        self._receiver = None

    # ── the test's side ─────────────────────────────────────────────────────────────────────────────────────────────

    def say(self, *messages: codec.Frames) -> None:
        """Have the worker read these in one burst."""
        assert self._receiver is not None
        for header, body in messages:
            self._receiver.link_message(header, body)
        self._receiver.link_idle()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something the worker says makes this true."""
        async with asyncio.timeout(20):
            while not condition():
                self._heard.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._heard.wait()

    async def end_of(self, request: int) -> tuple[End, Outcome]:
        """Wait for a request's terminal."""
        await self.until(lambda: request in self.ends)
        return self.ends[request]

    async def beats(self, count: int) -> None:
        """Wait until more than so many beats have come."""
        await self.until(lambda: len(self.loads) > count)

    def text(self, request: int) -> str:
        """What was said of an answer."""
        return "".join(chunk.text for chunk in self.chunks if chunk.request == request)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.log]

    def at_rest(self) -> None:
        """No table keeps anything of a request."""
        assert not self.service._sessions.busy
        assert len(self.service._runs) == 0


def dispatch(request: int, content: AnyRequest | None = None, **fields: Any) -> codec.Frames:
    """DISPATCH of a prompt, or of another request."""
    body = content or GenerateRequest(prompt="x")
    operation = "generate"
    if isinstance(body, EmbedRequest):
        operation = "embed"
    elif isinstance(body, OperateRequest):
        operation = "operate"
    known: dict[str, Any] = {
        "client": 7, "instance": INSTANCE, "request": request, "attempt": 0, "operation": operation, "model": "m",
        "window": 1_024,
    }  # fmt: skip
    return codec.pack_envelope(Dispatch(**{**known, **fields})), codec.encode(body)


def abort(*requests: int) -> codec.Frames:
    """ABORT of first attempts."""
    return codec.pack(Abort(instance=INSTANCE, attempts=[(request, 0) for request in requests]))


@contextlib.asynccontextmanager
async def bare_worker(
    monkeypatch: pytest.MonkeyPatch, *backends: BaseModelWorker, drained: bool = True, **config: Any
) -> AsyncIterator[BareWorker]:
    """A worker that is registered. At the end it is drained, or has ended by itself, and nothing is left."""
    made = BareWorker(*backends, **config)
    monkeypatch.setattr(links_module, "open_dealer", made.link)
    running = asyncio.create_task(made.service.run())
    waiting = asyncio.create_task(made.ready.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if running.done():
        await running
    try:
        yield made
    finally:
        if drained:
            await made.service.drain(0)
        async with asyncio.timeout(20):
            await asyncio.gather(running, return_exceptions=not drained)
    assert asyncio.all_tasks() == {asyncio.current_task()}
