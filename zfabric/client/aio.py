"""The asyncio client."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from zfabric.client.mailbox import Mailbox
from zfabric.client.requests import GenerateOptions, generate_request, vectors
from zfabric.client.results import Completion
from zfabric.client.stream import TokenStream
from zfabric.core.client_session import ClientSession
from zfabric.core.pending import Pending
from zfabric.errors import ClosedError, ConnectionLostError, FabricError, ProtocolError
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.curve import Credentials, default_credentials
from zfabric.transport.dealer import DealerLink
from zfabric.transport.endpoints import default_endpoint
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire import codec
from zfabric.wire.messages import Answer, Operation
from zfabric.wire.payloads import (
    AnyRequest,
    CountRequest,
    EmbedRequest,
    EmbedResult,
    Message,
    OperateRequest,
    Outcome,
)
from zfabric.wire.status import FabricStatus, ModelStatus, WorkerStatus

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")


class AsyncClient:
    """A client of the fabric, for one event loop. Use as an async context manager.

    Args:
        endpoint: The controller's; the default is the one all sides derive on one host.
        connect_timeout_ms: How long requests wait for a controller that is not there, at the start or after it was
            lost, before they fail with ConnectionLostError. Within that time an outage is invisible.
        label: Shown to operators.
        credentials: Keys for a controller that wants them; $ZFABRIC_KEY and $ZFABRIC_CONTROLLER_KEY by default.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        connect_timeout_ms: int = 10_000,
        label: str = "",
        credentials: Credentials | None = None,
    ) -> None:
        self.endpoint = endpoint or default_endpoint()
        self._credentials = credentials or default_credentials()
        self._connect_timeout_ms = connect_timeout_ms
        self._rng = random.Random(secrets.randbits(64))
        self._session = ClientSession(instance=secrets.randbits(63), rng=self._rng, build=__version__, label=label)
        self._link: DealerLink | None = None
        self._pid = os.getpid()
        self._away: asyncio.TimerHandle | None = None
        self._flush_due = False
        self._bad_messages = 0

    async def __aenter__(self) -> AsyncClient:
        self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def open(self) -> None:
        """Start connecting, on the running loop. Requests may be made at once."""
        self._check_process()
        if self._link is not None:
            raise ClosedError("the client is open already")
        self._loop = asyncio.get_running_loop()
        self._timer = LoopTimer(self._loop, self._tick)
        self._link = DealerLink(self.endpoint, self, self._rng, self._credentials)

    async def close(self) -> None:
        """End all requests with ClosedError, say goodbye, and free the socket. Safe to call twice."""
        link, self._link = self._link, None
        if link is None or os.getpid() != self._pid:
            return
        self._session.close()
        link.send_all(self._taken())
        # One turn, so that tasks that wait for streams see their end before the client is gone.
        await asyncio.sleep(0)
        self._timer.cancel()
        self._cancel_away()
        link.close()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> TokenStream:
        """Ask for text; the request leaves at once, and its answer is read from the stream.

        Args:
            model: Name or alias.
            prompt: Text; or give `messages` or `prompt_token_ids`.
            **options: See `GenerateOptions`.

        Raises:
            FabricError: The request can never be sent. All other errors come from the stream.
        """
        request, submit_options = generate_request(prompt, options)
        stream = TokenStream(self, model)
        stream._bind(lambda sink: self._submit("generate", request, sink, model=model, **submit_options))
        return stream

    async def generate(self, model: str, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Ask for text and wait for all of it; arguments as of `stream`. Cancelling the task cancels the request."""
        request, submit_options = generate_request(prompt, options)
        mailbox, pending = await self._call("generate", request, model=model, **submit_options)
        while mailbox.waiting:
            mailbox.take()
        return mailbox.completion(f"{pending.number:x}", model)

    async def embed(
        self,
        model: str,
        inputs: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        deadline_ms: int | None = None,
        priority: int = 0,
        **options: Any,
    ) -> NDArray[np.float32]:
        """Vectors of texts.

        Args:
            inputs: Texts, or lists of token ids; one text is one row.
            **options: `dimensions`, `normalize`, `truncate`, `pooling`: see `EmbedRequest`.

        Returns:
            float32 array of shape (len(inputs), dimensions), a read-only view of the received buffer.
        """
        rows: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
        request = EmbedRequest(inputs=rows, **options)
        mailbox, _ = await self._call("embed", request, model=model, deadline_ms=deadline_ms, priority=priority)
        return vectors(_result(mailbox.outcome, EmbedResult))

    async def count_tokens(
        self, model: str, prompt: str | None = None, *, messages: Sequence[Message] | None = None
    ) -> int:
        """Tokens of a prompt, as `stream` would use them."""
        request = CountRequest(prompt=prompt, messages=list(messages) if messages is not None else None)
        mailbox, _ = await self._call("count_tokens", request, model=model)
        return _result(mailbox.outcome, int)

    async def operate(self, worker: str, call: str, *, model: str = "", **arguments: Any) -> Any:
        """An operator's call to one worker, such as loading an adapter. It is never sent twice."""
        request = OperateRequest(call=call, arguments=arguments)
        mailbox, _ = await self._call("operate", request, model=model, worker=worker)
        return _result(mailbox.outcome, object)

    # ── the fabric ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def models(self, kind: str = "all") -> list[ModelStatus]:
        """Models that are served now: "all", "language", "multimodal" or "embedding" ones."""
        return await self._ask("models", list[ModelStatus], kind=kind)

    async def model_details(self, model: str) -> ModelStatus:
        """One model, by name or alias. Raises: UnknownModelError."""
        return await self._ask("model", ModelStatus, name=model)

    async def workers(self) -> list[WorkerStatus]:
        """Registered workers."""
        return await self._ask("workers", list[WorkerStatus])

    async def status(self) -> FabricStatus:
        """The controller in figures."""
        return await self._ask("status", FabricStatus)

    async def refresh(self) -> list[str]:
        """Have every worker report its load now. Returns the names of those that are asked."""
        return await self._ask("refresh", list[str])

    async def drain_worker(self, worker: str, limit_ms: int = 0) -> str:
        """Have a worker finish and leave; 0 is the worker's own limit. Returns its name. Raises: NoWorkerError."""
        return await self._ask("drain", str, worker=worker, limit_ms=limit_ms)

    def figures(self) -> dict[str, int]:
        """What this client counted: failovers, repeated chunks, reconnects …."""
        link = asdict(self._link.figures) if self._link is not None else {}
        return {**asdict(self._session.counters), **link, "bad_messages": self._bad_messages}

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def consumed(self, pending: Pending, units: int) -> None:
        """A reader took units (for streams)."""
        self._session.consumed(pending, units)
        if self._session.credit_due:
            self._schedule_flush()

    def cancel(self, pending: Pending) -> None:
        """A reader gave up (for streams)."""
        if os.getpid() == self._pid:
            self._session.cancel(pending)
            self._schedule_flush()

    def _submit(self, operation: Operation, request: AnyRequest, sink: Mailbox, **options: Any) -> Pending:
        self._check_process()
        if self._link is None:
            raise ClosedError("the client is not open; use it in an async with block")
        now_ns = monotonic_ns()
        pending = self._session.submit(operation, request, sink, now_ns, **options)
        if not self._session.ready:
            self._wait_for_controller()
        elif not self._flush_due:
            # The first request of a turn leaves at once; those that follow it in the same turn leave together.
            self._schedule_flush()
            self._link.send_all(self._taken())
        self._timer.arm(self._session.timers.next_ns(), now_ns)
        return pending

    async def _call(self, operation: Operation, request: AnyRequest, **options: Any) -> tuple[Mailbox, Pending]:
        """Submit and wait for the end. Raises the request's error."""
        done = asyncio.get_running_loop().create_future()
        mailbox = _Collector(self, done)
        pending = mailbox.pending = self._submit(operation, request, mailbox, **options)
        try:
            await done
        except asyncio.CancelledError:
            self.cancel(pending)
            raise
        if mailbox.error is not None:
            raise mailbox.error
        return mailbox, pending

    async def _ask(self, what: str, form: type[T], /, **arguments: object) -> T:
        self._check_process()
        if self._link is None:
            raise ClosedError("the client is not open; use it in an async with block")
        inquirer = _Inquirer(asyncio.get_running_loop().create_future())
        number = self._session.ask(what, arguments, inquirer)
        if self._session.ready:
            self._schedule_flush()
        else:
            self._wait_for_controller()
        try:
            answer = await inquirer.future
        finally:
            self._session.forget_query(number)
        return codec.unpack_result(answer.result, form)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the client belongs to process {self._pid}; make a new one after a fork", process=self._pid
            )

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._session.flush()
        if self._link is not None and self._session.outbox:
            self._link.send_all(self._taken())

    def _taken(self) -> list[tuple[bytes, bytes]]:
        taken, self._session.outbox = self._session.outbox, []
        return taken

    def _tick(self) -> None:
        self._session.tick(monotonic_ns())
        self.link_idle()

    # ── link ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self) -> None:
        self._session.connected(monotonic_ns())

    def link_down(self) -> None:
        self._session.disconnected()
        if self._session.busy:
            self._wait_for_controller()

    def link_denied(self) -> None:
        self._session.denied(self.endpoint)

    def link_message(self, header: bytes, body: bytes) -> None:
        try:
            self._session.receive(header, body, monotonic_ns())
        except FabricError:
            self._bad_messages += 1

    def link_idle(self) -> None:
        if self._link is None:
            return
        if self._session.ready or self._session.refused is not None:
            self._cancel_away()
        if self._session.refused is not None and not self._session.refused.retryable:
            self._session.abandon(self._session.refused)
        self._session.flush()
        if self._session.outbox:
            self._link.send_all(self._taken())
        self._timer.arm(self._session.timers.next_ns(), monotonic_ns())

    def _wait_for_controller(self) -> None:
        if self._away is None:
            self._away = self._loop.call_later(self._connect_timeout_ms / 1_000, self._give_up)

    def _cancel_away(self) -> None:
        if self._away is not None:
            self._away.cancel()
            self._away = None

    def _give_up(self) -> None:
        self._away = None
        error = ConnectionLostError(
            f"no controller answers at {self.endpoint} for {self._connect_timeout_ms} ms", endpoint=self.endpoint
        )
        self._session.abandon(self._session.refused or error)


class _Collector(Mailbox):
    """A sink whose reader wants the whole answer: it is woken once, at the end."""

    __slots__ = ("_client", "_done", "pending")

    def __init__(self, client: AsyncClient, done: asyncio.Future[None]) -> None:
        super().__init__(_nothing)
        self._client = client
        self._done = done
        self.pending: Pending | None = None

    def arrived(self, chunk: Any) -> None:
        super().arrived(chunk)
        if self.pending is not None:
            self._client.consumed(self.pending, len(chunk.token_ids) or 1)

    def ended(self, error: FabricError | None, outcome: Outcome | None) -> None:
        super().ended(error, outcome)
        if not self._done.done():
            self._done.set_result(None)


class _Inquirer:
    """Who waits for one answer of the controller."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Answer]) -> None:
        self.future = future

    def answered(self, error: FabricError | None, answer: Answer | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        elif answer is not None:
            self.future.set_result(answer)


def _nothing() -> None:
    """Nobody waits for single chunks."""


def _result(outcome: Outcome | None, kind: type[T]) -> T:
    if outcome is None:
        raise ProtocolError("the worker's result is missing")
    return codec.unpack_result(outcome.result, kind)
