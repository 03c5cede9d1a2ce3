"""Requests in the hands of backends: each is begun once, and its slot is free when its backend has ended with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from msgspec import structs

from zfabric.core.worker.orders import Columns
from zfabric.core.worker.session import Begin, Order
from zfabric.core.worker.sessions import WorkerSessions
from zfabric.core.worker.soundness import sound_text
from zfabric.errors import BackendError, FabricError
from zfabric.limits import DELTAS_PER_TURN, STOP_MS
from zfabric.transport.clock import monotonic_ns
from zfabric.wire.extra import check_extra
from zfabric.wire.payloads import AnyRequest, CountRequest, Delta, GenerateRequest, OperateRequest, TextRequest, Usage
from zfabric.wire.plain import plain_integer
from zfabric.wire.tasks import ClassifyResult, EmbedResult, EmbedTokensResult
from zfabric.worker.base import BaseModelWorker, StepwiseModelWorker
from zfabric.worker.capabilities import check_options, check_request, leave_tools_out, refuse_unknown_extra
from zfabric.worker.served import Served, ServedModels
from zfabric.worker.traces import Traces, within

#: What a backend may raise for a request. A cancellation that nobody here asked for is a failure like any other.
_FAILURES: Final = (Exception, asyncio.CancelledError)


class _Run:
    """One request at its backend. Step-wise engines have no task for it."""

    __slots__ = ("backend", "limit", "task")

    def __init__(self, backend: BaseModelWorker) -> None:
        self.backend = backend
        self.task: asyncio.Task[None] | None = None
        self.limit: asyncio.TimerHandle | None = None


class Runs:
    """Begins and stops requests.

    Args:
        sessions: Told what became of each.
        loop: The service's event loop.
        log: Called with an event's name and fields.
        obey: Does what the session's calls led to.
        changed: Called when something is to be sent, or a slot became free.
        traces: Told in whose trace backends work; None where nobody makes spans.
    """

    def __init__(
        self,
        sessions: WorkerSessions,
        loop: asyncio.AbstractEventLoop,
        log: Callable[..., Any],
        obey: Callable[[Sequence[Order]], None],
        changed: Callable[[], None],
        traces: Traces | None = None,
    ) -> None:
        self._traces = traces
        self._sessions = sessions
        self._loop = loop
        self._log = log
        self._obey = obey
        self._changed = changed
        self._runs: dict[str, _Run] = {}
        #: Deltas that came from backends.
        self.units = 0

    def __len__(self) -> int:
        return len(self._runs)

    def of(self, backend: BaseModelWorker | None) -> list[str]:
        """Names of the requests of a backend, or of all."""
        return [name for name, run in self._runs.items() if backend is None or run.backend is backend]

    # ── begin ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, order: Begin, served: ServedModels) -> None:
        """Hand a request to its backend."""
        if order.trace is None:
            self._begin(order, served)
            return
        with within(order.trace, self._traces):
            self._begin(order, served)

    def _begin(self, order: Begin, served: ServedModels) -> None:
        request, request_id = order.request, order.request_id
        try:
            if request_id in self._runs:
                raise BackendError(f"the backend has not ended with request {request_id} of the same name")
            if isinstance(request, OperateRequest):
                backend = served.for_call(request.model)
                work = partial(self._unary, order.operation, request, backend.operate)
            else:
                known = served.find(request.model)
                backend = known.backend
                check_request(request, order.operation, known.label, known.capabilities)
                if isinstance(request, TextRequest | CountRequest):
                    leave_tools_out(request)
                if isinstance(request, CountRequest):
                    check_options(request, known.label, known.parameters)
                if isinstance(request, TextRequest):
                    request = self._prepared(request, known)
                    work = partial(self._generate, request, backend)
                else:
                    # An operation is called as the method that does it.
                    work = partial(self._unary, order.operation, request, getattr(backend, order.operation))
            run = self._runs[request_id] = _Run(backend)
            if isinstance(request, GenerateRequest) and isinstance(backend, StepwiseModelWorker):
                backend.begin(request)
                return
        except _FAILURES as error:
            self.fail(request_id, error)
            return
        run.task = self._loop.create_task(self._guarded(request_id, work))
        run.task.add_done_callback(partial(self._ended, request_id))

    def _prepared(self, request: TextRequest, served: Served) -> GenerateRequest:
        """The request as its backend gets it: with the model's own values where the caller set none, and the client's seed
        where there is no other.

        Raises:
            UnsupportedParameterError: A parameter is not honoured, or a key of `extra` is not known.
            RequestError: A value of `extra` is of another type than its backend says.
        """
        sampling = request.sampling.resolved(served.defaults)
        greedy = sampling.greedy
        if greedy and not served.seeded and sampling.seed is not None:
            # It makes no difference, and comes with answers that another worker began.
            sampling = structs.replace(sampling, seed=None)
            request.sampling = structs.replace(request.sampling, seed=None)
        request.sampling.require(served.parameters, served.label)
        check_options(request, served.label, served.parameters)
        if request.extra:
            refuse_unknown_extra(request.extra, served.label, served.extra)
            check_extra(request.extra, served.backend.extra or {})
        if request.drawn_seed is not None and sampling.seed is None and not greedy and served.seeded:
            sampling = structs.replace(sampling, seed=request.drawn_seed)
        if sampling.reproducible:
            self._sessions.mark_exact(request.request_id)
        return GenerateRequest(**{**structs.asdict(request), "sampling": sampling})

    async def _guarded(self, request_id: str, work: Callable[[], Awaitable[None]]) -> None:
        """Whatever a backend raises is its request's error. A cancellation is either ours, and `_ended` sees what is
        left to do, or the backend's own."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 — as above
            self.fail(request_id, error)

    async def _unary(self, operation: str, request: AnyRequest, call: Callable[..., Any]) -> None:
        result = _checked(operation, await call(request))
        self._obey(self._sessions.succeed(request.request_id, result, monotonic_ns()))
        self._changed()

    async def _generate(self, request: GenerateRequest, backend: BaseModelWorker) -> None:
        request_id = request.request_id
        deltas = backend.generate(request)
        if not hasattr(deltas, "__aiter__"):
            if asyncio.iscoroutine(deltas):
                deltas.close()
            raise TypeError(f"generate of {type(backend).__name__} is no async generator")
        count = 0
        try:
            async for delta in deltas:
                count += 1
                if not count % DELTAS_PER_TURN:
                    await asyncio.sleep(0)
                if delta.finish_reason is not None and delta.usage is None:
                    delta.usage = await self._usage(backend, request, delta)
                self.emit([(request_id, delta)])
                self._changed()
                if self._sessions.find(request_id) is None:
                    return
            # What returns without a word of its end has come to it.
            for index in self._sessions.open_choices(request_id):
                ending = Delta(index=index, finish_reason="stop")
                ending.usage = await self._usage(backend, request, ending)
                self.emit([(request_id, ending)])
        finally:
            close = getattr(deltas, "aclose", None)
            if close is not None:
                await close()

    async def _usage(self, backend: BaseModelWorker, request: GenerateRequest, last: Delta) -> Usage | None:
        """Count for a backend that does not, at the end of the last choice."""
        stream = self._sessions.find(request.request_id)
        if stream is None or stream.open_choices > 1:
            return None
        completion = len(last.token_ids) + stream.completion_tokens + len(request.resume_token_ids)
        if request.prompt_token_ids is not None:
            return Usage(len(request.prompt_token_ids), completion)
        try:
            count = CountRequest(prompt=request.prompt, messages=request.messages, model=request.model)
            return Usage(int(await backend.count_tokens(count)), completion)
        except Exception:  # noqa: BLE001 — an answer that is there does not fail for want of a count
            return Usage(0, completion, estimated=True)

    # ── what came of it ─────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, step: list[tuple[str, Delta]]) -> None:
        """Deltas of an engine; they leave with the next flush."""
        before = self._sessions.count
        self.units += len(step)
        orders = self._sessions.emit(step, monotonic_ns())
        if orders or self._sessions.count != before:
            self._after_step(orders, [request_id for request_id, _ in step])

    def emit_columns(self, step: Columns) -> None:
        """As `emit`, of a step's plain tokens."""
        before = self._sessions.count
        self.units += len(step.request_ids)
        orders = self._sessions.emit_columns(step, monotonic_ns())
        if orders or self._sessions.count != before:
            self._after_step(orders, step.request_ids)

    def _after_step(self, orders: Sequence[Order], request_ids: Iterable[str]) -> None:
        """Some of a step's requests have ended with it, or are to stop."""
        if orders:
            self._obey(orders)
        for request_id in request_ids:
            if self._sessions.find(request_id) is None:
                self._forget_stepped(request_id)
        self._changed()

    def fail(self, request_id: str, error: BaseException) -> None:
        """A backend gives up on a request, or raised for it."""
        known = (
            error if isinstance(error, FabricError) else BackendError(f"{type(error).__name__}: {sound_text(error)}")
        )
        if known is not error:
            self._log("backend_error", **self._sessions.log_names(request_id), error=known.message)
        self._sessions.fail(request_id, known, monotonic_ns())
        self._forget_stepped(request_id)
        self._changed()

    def _forget_stepped(self, request_id: str) -> None:
        """A step-wise engine has ended with a request. Of others the task's end is the word for it."""
        run = self._runs.get(request_id)
        if run is not None and run.task is None:
            del self._runs[request_id]

    # ── stop ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, request_id: str) -> None:
        """Nothing more is wanted of a request; the session hears of it when its backend has stopped."""
        run = self._runs.get(request_id)
        if run is not None and run.task is not None:
            # Its own task finds out by itself, and closes what it has open without being interrupted.
            if run.task is not asyncio.current_task():
                run.task.cancel()
            if run.limit is None:
                run.limit = self._loop.call_later(STOP_MS / 1_000, self._stop_is_late, request_id, run)
            return
        if run is not None and isinstance(run.backend, StepwiseModelWorker):
            del self._runs[request_id]
            try:
                run.backend.abort(request_id)
            except _FAILURES as error:
                self._log(
                    "abort_failed",
                    **self._sessions.log_names(request_id),
                    error=f"{type(error).__name__}: {sound_text(error)}",
                )
        self._stopped(request_id)

    def _stop_is_late(self, request_id: str, run: _Run) -> None:
        backend = type(run.backend).__name__
        names = self._sessions.log_names(request_id)
        self._log("stop_limit_reached", **names, backend=backend, limit_s=STOP_MS / 1_000)
        self._stopped(request_id)

    def _stopped(self, request_id: str) -> None:
        self._obey(self._sessions.stopped(request_id, monotonic_ns()))
        self._changed()

    def _ended(self, request_id: str, task: asyncio.Task[None]) -> None:
        """A task is over, however it came to that, also before it began: so is its request."""
        run = self._runs.pop(request_id)
        if run.limit is not None:
            run.limit.cancel()
        if not task.cancelled():
            task.exception()
        if self._sessions.find(request_id) is not None:
            self.fail(request_id, RuntimeError(f"{type(run.backend).__name__} ended a request without an answer"))
        self._stopped(request_id)

    async def close(self) -> None:
        """Stop everything, and wait for it as long as a backend may take."""
        for request_id in list(self._runs):
            self.stop(request_id)
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_MS / 1_000)
            if late:
                self._log("stop_limit_reached", requests=len(late), limit_s=STOP_MS / 1_000)


def _checked(operation: str, result: Any) -> object:
    """A result as its caller will read it. Raises: Exception: It is something else."""
    check = _CHECKS.get(operation)
    return result if check is None else check(result)


def _embedded(result: Any) -> EmbedResult:
    rows, dimensions = plain_integer(result.rows), plain_integer(result.dimensions)
    return EmbedResult(rows=rows, dimensions=dimensions, data=_values(result.data, rows, dimensions))


def _embedded_tokens(result: Any) -> EmbedTokensResult:
    tokens, dimensions = [plain_integer(count) for count in result.tokens], plain_integer(result.dimensions)
    return EmbedTokensResult(tokens=tokens, dimensions=dimensions, data=_values(result.data, sum(tokens), dimensions))


def _values(given: Any, rows: int, dimensions: int) -> bytes:
    """The buffer of a matrix. Raises: ValueError: It has another size."""
    data = given if isinstance(given, bytes) else bytes(memoryview(given))
    if len(data) != 4 * rows * dimensions:
        raise ValueError(f"{len(data)} bytes came for {rows} rows of {dimensions} float32")
    return data


def _classified(result: Any) -> ClassifyResult:
    labels = [str.__str__(label) for label in result.labels]
    rows = _rows(result.probabilities)
    if labels and any(len(row) != len(labels) for row in rows):
        raise ValueError(f"{len(labels)} names came for {max(map(len, rows))} classes")
    return ClassifyResult(rows, labels)


def _rows(result: Any) -> list[list[float]]:
    return [[float(value) for value in row] for row in result]


#: How plain results are made of what backends give, which may be numbers of NumPy or torch.
_CHECKS: Final[dict[str, Callable[[Any], object]]] = {
    "count_tokens": plain_integer,
    "tokenize": lambda result: [plain_integer(token) for token in result],
    "detokenize": lambda result: str.__str__(result),
    "score": lambda result: [float(value) for value in result],
    "classify": _classified,
    "embed": _embedded,
    "embed_tokens": _embedded_tokens,
    "reward": _rows,
}
