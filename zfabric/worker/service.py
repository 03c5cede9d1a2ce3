"""Serves backends on the fabric: loads them, registers, beats, and moves requests in and deltas out."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from zfabric.core.worker_session import Begin, DrainAsked, Order, Refused, Registered, Stop, WorkerSession
from zfabric.errors import (
    BackendError,
    ConfigurationError,
    FabricError,
    IncorrectKeyError,
    UnknownModelError,
    WorkerLostError,
)
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.dealer import DealerLink
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import CountRequest, Delta, EmbedRequest, GenerateRequest, OperateRequest, Usage
from zfabric.worker.base import BaseModelWorker
from zfabric.worker.config import WorkerConfig

Log = Callable[..., Any]
#: What leaves libzmq's pipe within this time after a goodbye is sent; the rest is for the next worker anyway.
_FAREWELL_S: Final = 0.02


def _silent(event: str, **fields: object) -> None:
    """The log of a program that wants none."""


class WorkerService:
    """One worker process: any number of backends under one name.

    Args:
        backends: Loaded in order; each serves the models that its `load` names.
        config: See `WorkerConfig`.
        log: Called with an event's name and fields; never per request.
        on_ready: Called with all models, once, when the controller has accepted the worker.
    """

    def __init__(
        self,
        backends: Sequence[BaseModelWorker],
        config: WorkerConfig | None = None,
        *,
        log: Log | None = None,
        on_ready: Callable[[list[ModelInfo]], None] | None = None,
    ) -> None:
        if not backends:
            raise ConfigurationError("no backend is given, one at least is needed")
        self.config = config or WorkerConfig()
        self._backends = list(backends)
        self._log = log or _silent
        self._on_ready = on_ready
        self._models: dict[int, list[ModelInfo]] = {}
        self._route: dict[str, _Served] = {}
        self._owner: dict[str, BaseModelWorker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._link: DealerLink | None = None
        self._flush_due = False
        self._units = self._units_since = 0
        self._reported_ns = 0
        self._failure: FabricError | None = None

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Load, register and serve until drained.

        Raises:
            FabricError: The engine died, or the controller refuses this worker for good.
            Exception: Whatever made loading impossible.
        """
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        rng = random.Random(secrets.randbits(64))
        self._session = WorkerSession(
            name=self.config.name,
            instance=secrets.randbits(63),
            rng=rng,
            build=__version__,
            speed=self.config.speed,
            beats=self.config.beats,
            stream_interval=self.config.stream_interval,
        )
        self._timer = LoopTimer(self._loop, self._tick)
        try:
            await self._load()
            self._link = DealerLink(self.config.endpoint, self, rng, self.config.credentials)
            await self._stopping.wait()
        finally:
            await self._close()
        if self._failure is not None:
            raise self._failure

    async def drain(self, limit_ms: int | None = None) -> None:
        """Take nothing new, let running requests finish within the limit, hand back the rest, and have `run` return."""
        if self._link is not None and not self._session.draining:
            limit_s = (self.config.drain_ms if limit_ms is None else limit_ms) / 1_000
            self._log("draining", running=len(self._session.streams), limit_s=limit_s)
            self._session.drain(monotonic_ns())
            self.link_idle()
            try:
                async with asyncio.timeout(limit_s):
                    while self._session.streams:
                        self._idle.clear()
                        await self._idle.wait()
            except TimeoutError:
                self._log("drain_limit_reached", handed_back=len(self._session.streams))
        self._stopping.set()

    async def reload(self) -> None:
        """Have all backends read their configuration anew. What fails is logged, and stays as it was."""
        if self._link is None or self._session.draining:
            return
        for backend in self._backends:
            try:
                await backend.reload()
                self._log("reloaded", backend=type(backend).__name__, models=sorted(self._route))
            except Exception as error:  # noqa: BLE001 — a mistyped file must not end what serves
                self._log("reload_failed", backend=type(backend).__name__, error=f"{type(error).__name__}: {error}")

    async def _load(self) -> None:
        for backend in self._backends:
            backend.steps = _Steps(self, backend)
            self._log("loading", backend=type(backend).__name__)
            loaded = await backend.load()
            self._set_models(backend, [loaded] if isinstance(loaded, ModelInfo) else list(loaded))
        self._session.load.slots = self.config.slots or sum(backend.slots for backend in self._backends)
        self._session.announce(self._announced(), monotonic_ns())

    def _set_models(self, backend: BaseModelWorker, infos: list[ModelInfo]) -> None:
        """Route these models to a backend. Raises: ConfigurationError if another backend has a name."""
        for name in [name for name, served in self._route.items() if served.backend is backend]:
            del self._route[name]
        for info in infos:
            info.parameters = info.parameters or sorted(backend.parameters)
            served = _Served(backend, f"model {info.name!r}", frozenset(info.parameters))
            for name in (info.name, *info.aliases):
                if name in self._route:
                    raise ConfigurationError(f"two models of this worker are named {name!r}", model=name)
                self._route[name] = served
        self._models[id(backend)] = infos

    def _announced(self) -> list[ModelInfo]:
        return [info for infos in self._models.values() for info in infos]

    async def _close(self) -> None:
        self._timer.cancel()
        if self._link is not None:
            for request_id in list(self._session.streams):
                self._stop(request_id)
            self._session.goodbye("drained" if self._failure is None else "engine died")
            self._link.send_all(_taken(self._session))
            await asyncio.sleep(_FAREWELL_S)
            self._link.close()
            self._link = None
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for backend in self._backends:
            await backend.close()

    # ── link ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def link_up(self) -> None:
        self._log("connected", endpoint=self.config.endpoint)
        self._session.connected(monotonic_ns())

    def link_down(self) -> None:
        self._log("disconnected", endpoint=self.config.endpoint, running=len(self._session.streams))
        self._session.disconnected()

    def link_denied(self) -> None:
        endpoint = self.config.endpoint
        self.die(IncorrectKeyError(f"the controller at {endpoint} does not know this key", endpoint=endpoint))

    def link_message(self, header: bytes, body: bytes) -> None:
        try:
            orders = self._session.receive(header, body, monotonic_ns())
        except FabricError as error:
            self._log("bad_message", error=str(error))
            return
        for order in orders:
            self._obey(order)

    def link_idle(self) -> None:
        """Send what the last messages led to, and re-arm the timer."""
        if self._link is None:
            return
        if self._session.outbox:
            self._link.send_all(_taken(self._session))
        self._timer.arm(self._session.timers.next_ns(), monotonic_ns())

    def _tick(self) -> None:
        now_ns = monotonic_ns()
        self._refresh_load(now_ns)
        self._session.tick(now_ns)
        self.link_idle()

    def _refresh_load(self, now_ns: int) -> None:
        """Ask the engines how they are, for the next beat."""
        load = self._session.load
        reports = [backend.load_report() for backend in self._backends]
        load.waiting = sum(report.waiting for report in reports)
        steps = [report.progress for report in reports if report.progress is not None]
        load.progress = sum(steps) if len(steps) == len(reports) else self._units
        blocks = [report.kv_blocks_free for report in reports if report.kv_blocks_free is not None]
        load.kv_blocks_free = sum(blocks) if blocks else None
        slots = [report.slots for report in reports if report.slots is not None]
        if slots and self.config.slots is None:
            load.slots = sum(slots)
        load.gauges = {name: value for report in reports for name, value in report.gauges.items()}
        elapsed_ns = now_ns - self._reported_ns
        if elapsed_ns > 500_000_000:
            load.tokens_per_second = round(self._units_since * 1e9 / elapsed_ns, 1) if self._reported_ns else 0.0
            self._units_since = 0
            self._reported_ns = now_ns

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._begin(order)
        elif isinstance(order, Stop):
            self._stop(order.request_id)
        elif isinstance(order, Registered):
            self._log("registered", worker=self.config.name, models=sorted(self._route))
            if self._on_ready is not None:
                self._on_ready(self._announced())
                self._on_ready = None
        elif isinstance(order, Refused):
            self._log("refused", error=str(order.error), code=order.error.code)
            if not order.error.retryable:
                self.die(order.error)
        elif isinstance(order, DrainAsked):
            self._drain_task = self._loop.create_task(self.drain(order.limit_ms or None))

    def _begin(self, order: Begin) -> None:
        """Hand a request to its backend."""
        request, request_id = order.request, order.request_id
        try:
            served = self._find(request.model)
            backend = self._owner[request_id] = served.backend
            if isinstance(request, GenerateRequest):
                request.sampling.require(served.parameters, served.label)
                if backend.is_stepwise():
                    backend.begin(request)
                    return
                work = self._generate(backend, request)
            elif isinstance(request, EmbedRequest):
                work = self._unary(request_id, backend.embed(request))
            elif isinstance(request, CountRequest):
                work = self._unary(request_id, backend.count_tokens(request))
            else:
                assert isinstance(request, OperateRequest)
                work = self._unary(request_id, backend.operate(request))
        except Exception as error:  # noqa: BLE001 — whatever a backend raises is its request's error, not ours
            self._fail(request_id, error)
            return
        self._tasks[request_id] = self._loop.create_task(work)

    def _find(self, model: str) -> _Served:
        if not model:
            return next(iter(self._route.values()))
        found = self._route.get(model)
        if found is None:
            raise UnknownModelError(f"worker {self.config.name!r} does not serve {model!r}", model=model)
        return found

    def _stop(self, request_id: str) -> None:
        """Nothing more is wanted of a request."""
        backend = self._owner.pop(request_id, None)
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()
        elif backend is not None and backend.is_stepwise():
            backend.abort(request_id)
        self._note_idle()

    async def _generate(self, backend: BaseModelWorker, request: GenerateRequest) -> None:
        request_id = request.request_id
        try:
            async with aclosing(backend.generate(request)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    if delta.finish_reason is not None and delta.usage is None:
                        delta.usage = await self._usage(backend, request, delta)
                    self._emit(request_id, delta)
            if request_id in self._session.streams:
                ending = Delta(finish_reason="stop")
                ending.usage = await self._usage(backend, request, ending)
                self._emit(request_id, ending)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 — whatever a backend raises is its request's error, not ours
            self._fail(request_id, error)
        finally:
            self._tasks.pop(request_id, None)

    async def _usage(self, backend: BaseModelWorker, request: GenerateRequest, last: Delta) -> Usage:
        """Count for a backend that does not."""
        stream = self._session.streams.get(request.request_id)
        completion = len(last.token_ids) + (stream.completion_tokens if stream else 0) + len(request.resume_token_ids)
        if request.prompt_token_ids is not None:
            return Usage(len(request.prompt_token_ids), completion)
        try:
            count = CountRequest(prompt=request.prompt, messages=request.messages, model=request.model)
            return Usage(await backend.count_tokens(count), completion)
        except FabricError:
            return Usage(0, completion, estimated=True)

    async def _unary(self, request_id: str, work: Any) -> None:
        try:
            result = await work
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 — as above
            self._fail(request_id, error)
        else:
            self._units += 1
            self._session.succeed(request_id, result, monotonic_ns())
            self._owner.pop(request_id, None)
            self._schedule_flush()
        finally:
            self._tasks.pop(request_id, None)
            self._note_idle()

    # ── from engines ────────────────────────────────────────────────────────────────────────────────────────────────

    def emit_step(self, step: Iterable[tuple[str, Delta]]) -> None:
        """Take a step of an engine that hands over all of its requests at once: it leaves now."""
        self._take(list(step))
        self._flush()

    def _emit(self, request_id: str, delta: Delta) -> None:
        """Take one request's delta; it leaves when the loop has turned once, with whatever else came in that turn."""
        self._take([(request_id, delta)])
        self._schedule_flush()

    def _take(self, step: list[tuple[str, Delta]]) -> None:
        before = len(self._session.streams)
        self._session.emit(step, monotonic_ns())
        self._units += len(step)
        self._units_since += len(step)
        if len(self._session.streams) != before:
            for request_id, _ in step:
                if request_id not in self._session.streams:
                    self._owner.pop(request_id, None)
            self._note_idle()

    def _fail(self, request_id: str, error: BaseException) -> None:
        known = error if isinstance(error, FabricError) else BackendError(f"{type(error).__name__}: {error}")
        if not isinstance(error, FabricError):
            self._log("backend_error", request=request_id, error=f"{type(error).__name__}: {error}")
        self._session.fail(request_id, known, monotonic_ns())
        self._owner.pop(request_id, None)
        self._note_idle()
        self._schedule_flush()

    def die(self, error: FabricError, backend: BaseModelWorker | None = None) -> None:
        """An engine is gone: its requests fail over, and `run` raises."""
        self._log("engine_died", error=str(error))
        for request_id in [r for r, owner in self._owner.items() if backend is None or owner is backend]:
            self._fail(request_id, WorkerLostError(f"engine died: {error}", worker=self.config.name))
        self._failure = error
        self._stopping.set()

    def models_changed(self, backend: BaseModelWorker, models: Sequence[ModelInfo]) -> None:
        """Announce another set of models of one backend."""
        self._set_models(backend, list(models))
        self._session.announce(self._announced(), monotonic_ns())
        self.link_idle()

    def log(self, event: str, **fields: object) -> None:
        """A backend has something to tell the operator."""
        self._log(event, **fields)

    def fail(self, request_id: str, error: FabricError) -> None:
        """A step-wise engine gives up on one request."""
        self._fail(request_id, error)

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._session.flush()
        if self._link is not None and self._session.outbox:
            self._link.send_all(_taken(self._session))

    def _note_idle(self) -> None:
        if not self._session.streams:
            self._idle.set()


class _Served(NamedTuple):
    """A name's backend, what errors call the model, and the sampling parameters that it knows."""

    backend: BaseModelWorker
    label: str
    parameters: frozenset[str]


class _Steps:
    """The sink of one backend."""

    __slots__ = ("_backend", "_service")

    def __init__(self, service: WorkerService, backend: BaseModelWorker) -> None:
        self._service = service
        self._backend = backend

    def emit(self, step: Iterable[tuple[str, Delta]]) -> None:
        self._service.emit_step(step)

    def fail(self, request_id: str, error: FabricError) -> None:
        self._service.fail(request_id, error)

    def models_changed(self, models: Sequence[ModelInfo]) -> None:
        self._service.models_changed(self._backend, models)

    def log(self, event: str, **fields: object) -> None:
        self._service.log(event, backend=type(self._backend).__name__, **fields)

    def engine_died(self, error: FabricError) -> None:
        self._service.die(error, self._backend)


def _taken(session: WorkerSession) -> list[tuple[bytes, bytes]]:
    taken, session.outbox = session.outbox, []
    return taken
