"""Serves backends on the fabric: loads them, registers, beats, and moves requests in and deltas out."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from zfabric.core.worker.cached import CacheChange
from zfabric.core.worker.figures import WorkerFigures
from zfabric.core.worker.orders import Columns
from zfabric.core.worker.session import (
    Begin,
    DrainAsked,
    DrainWithdrawn,
    Faulted,
    Order,
    Refused,
    Registered,
    Spoiled,
    Stop,
)
from zfabric.core.worker.sessions import WorkerSessions
from zfabric.core.worker.soundness import sound_text
from zfabric.errors import BackendError, ConfigurationError, FabricError, IncorrectKeyError, WorkerLostError
from zfabric.limits import SLOTS_MAX
from zfabric.transport.clock import monotonic_ns
from zfabric.transport.loop_timer import LoopTimer
from zfabric.version import __version__
from zfabric.wire.load import Load
from zfabric.wire.messages import ModelInfo
from zfabric.wire.payloads import Delta
from zfabric.worker.base import BaseModelWorker
from zfabric.worker.config import WorkerConfig
from zfabric.worker.links import ControllerLinks
from zfabric.worker.outlets import WorkerOutlets
from zfabric.worker.reports import LoadReports
from zfabric.worker.runs import Runs
from zfabric.worker.served import ServedModels
from zfabric.worker.sink import BackendSink
from zfabric.worker.traces import Traces

Log = Callable[..., Any]
#: What leaves libzmq's pipe within this time after a goodbye is sent; the rest is for the next worker anyway.
_FAREWELL_S: Final = 0.02


def _harmless(log: Log | None) -> Log:
    """A log that costs nobody anything if it breaks, as when whoever read it is gone."""

    def write(event: str, **fields: object) -> None:
        if log is not None:
            with contextlib.suppress(Exception):
                log(event, **fields)

    return write


class WorkerService:
    """One worker process: any number of backends under one name.

    Args:
        backends: Loaded in order; each serves the models that its `load` names.
        config: See `WorkerConfig`.
        log: Called with an event's name and fields; never per request, but for requests that a backend fails.
        on_ready: Called with all models, once, when the controller has accepted the worker.
        traces: Told of requests whose clients have them traced; None passes what is said of their traces on to backends,
            and makes no spans.
    """

    def __init__(
        self,
        backends: Sequence[BaseModelWorker],
        config: WorkerConfig | None = None,
        *,
        log: Log | None = None,
        on_ready: Callable[[list[ModelInfo]], None] | None = None,
        traces: Traces | None = None,
    ) -> None:
        if not backends:
            raise ConfigurationError("no backend is given, one at least is needed")
        self.config = config or WorkerConfig()
        self._backends = list(backends)
        self._log = _harmless(log)
        self._on_ready = on_ready
        self._traces = traces
        self._served = ServedModels(self.config.name, backends, [()] * len(self._backends))
        self._reports = LoadReports(self._backends, self.config.slots, self._log)
        self._links: ControllerLinks | None = None
        self._flush_due = False
        self._failure: FabricError | None = None
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._drain_limit: float | None = None
        self._draining: asyncio.Task[None] | None = None
        self._host_drains = False
        self._drain_asked: asyncio.Task[None] | None = None
        self._was_registered = False

    @property
    def load(self) -> Load | None:
        """What the last beat told; None while models are loaded, and at the end."""
        return self._sessions.load if self._links is not None else None

    @property
    def units(self) -> int:
        """Deltas that its backends made. Not before `load` tells something."""
        return self._runs.units

    @property
    def figures(self) -> WorkerFigures:
        """What is counted of its requests. Not before `load` tells something."""
        return self._sessions.observer.figures

    def counted(self) -> dict[str, int]:
        """What its links counted, together; empty where there is none."""
        return self._links.counted() if self._links is not None else {}

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Load, register and serve until drained.

        Raises:
            FabricError: The engine died, the models cannot be announced, or the controller refuses this worker for good.
            Exception: Whatever made loading impossible.
        """
        self._loop = asyncio.get_running_loop()
        rng = random.Random(secrets.randbits(64))
        self._sessions = WorkerSessions(
            name=self.config.name,
            instance=secrets.randbits(63),
            rng=rng,
            build=__version__,
            speed=self.config.speed,
            beats=self.config.beats,
            stream_interval=self.config.stream_interval,
        )
        self._outlets = WorkerOutlets(self._sessions, self._traces, self.config.record, self._log)
        self._runs = Runs(self._sessions, self._loop, self._log, self._obey_all, self._changed, self._traces)
        self._timer = LoopTimer(self._loop, self._tick)
        try:
            await self._load()
            self._links = ControllerLinks(
                self.config, self._sessions, rng, self._log, self._obey_all, self._denied, self._settled
            )
            self._links.start()
            await self._stopping.wait()
        finally:
            await self._close()
        if self._failure is not None:
            raise self._failure

    async def drain(self, limit_ms: int | None = None) -> None:
        """Take nothing new, let running requests finish within the limit, hand back the rest, and have `run` return.

        Asked again while it runs, it goes on, and the nearer of the limits holds. Returns when nothing runs any more; to
        cancel the call does not stop the drain.

        Args:
            limit_ms: How long running requests may take; None for the configuration's `drain_ms`.
        """
        self._host_drains = True
        await self._drain_within(limit_ms)

    async def _drain_within(self, limit_ms: int | None) -> None:
        if self._links is None:
            self._stopping.set()
            return
        until = self._loop.time() + (self.config.drain_ms if limit_ms is None else limit_ms) / 1_000
        if self._drain_limit is None or until < self._drain_limit:
            self._drain_limit = until
            self._idle.set()
        if self._draining is None:
            self._log("draining", running=self._sessions.count, limit_s=round(until - self._loop.time(), 3))
            self._sessions.drain(monotonic_ns())
            self._send()
            self._draining = self._loop.create_task(self._drain())
        await asyncio.shield(self._draining)

    def _stay(self) -> None:
        """An operator takes a drain back. What the host itself wants, and a drain that is over, stays as it is."""
        if self._host_drains or self._draining is None or self._draining.done():
            return
        self._draining.cancel()
        self._draining = self._drain_limit = None
        self._log("drain_withdrawn", running=self._sessions.count)
        self._sessions.undrain(monotonic_ns())

    async def _drain(self) -> None:
        """Wait until nothing runs, or the limit has come, which may move meanwhile."""
        while self._sessions.busy:
            assert self._drain_limit is not None
            self._idle.clear()
            try:
                async with asyncio.timeout_at(self._drain_limit):
                    await self._idle.wait()
            except TimeoutError:
                self._log("drain_limit_reached", handed_back=self._sessions.count)
                break
        self._stopping.set()

    async def reload(self) -> None:
        """Have all backends read their configuration anew. What fails is logged, and stays as it was."""
        if self._links is None or self._sessions.draining:
            return
        for backend in self._backends:
            try:
                await backend.reload()
                self._log("reloaded", backend=type(backend).__name__, models=self._served.names)
            except Exception as error:  # noqa: BLE001 — a mistyped file must not end what serves
                self._log("reload_failed", backend=type(backend).__name__, error=f"{type(error).__name__}: {error}")

    async def _load(self) -> None:
        for backend in self._backends:
            backend.steps = BackendSink(self, backend, self._loop)
            self._log("loading", backend=type(backend).__name__)
            loaded = await backend.load()
            self._serve(backend, [loaded] if isinstance(loaded, ModelInfo) else loaded)
        slots = self.config.slots or sum(int(backend.slots) for backend in self._backends)
        self._sessions.load.slots = max(0, min(slots, SLOTS_MAX))
        self._reports.refresh(self._sessions.load, 0, monotonic_ns())

    def _serve(self, backend: BaseModelWorker, infos: Sequence[ModelInfo]) -> None:
        """Serve these models of a backend from now on, and say so. Raises: ConfigurationError: All stays as it was."""
        if not isinstance(infos, Iterable):
            raise ConfigurationError(f"{type(backend).__name__} names {type(infos).__name__} as its models")
        served = self._served.replaced(backend, list(infos))
        self._sessions.announce(served.announced, monotonic_ns())
        self._served = served

    async def _close(self) -> None:
        self._timer.cancel()
        if self._links is not None:
            self._sessions.goodbye("drained" if self._failure is None else "engine died")
            self._links.send()
            await asyncio.sleep(_FAREWELL_S)
            self._links.close()
            self._links = None
        await self._runs.close()
        self._outlets.close()
        for backend in self._backends:
            try:
                await backend.close()
            except Exception as error:  # noqa: BLE001 — the others are to be freed all the same
                self._log("close_failed", backend=type(backend).__name__, error=f"{type(error).__name__}: {error}")

    # ── links ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _denied(self, error: FabricError) -> None:
        """A controller lets no connection in."""
        self._log("refused", error=str(error), code=error.code)
        # A controller that is just being set up anew is met by workers that have served; a key that is not known stays so.
        if not self._sessions.registered and (not self._was_registered or isinstance(error, IncorrectKeyError)):
            self.die(error)

    def _send(self) -> None:
        """Send what there is to say, and re-arm the timer."""
        if self._links is not None:
            self._links.settle()

    def _settled(self) -> None:
        self._timer.arm(self._sessions.next_ns(), monotonic_ns())
        self._outlets.pass_on()

    def _tick(self) -> None:
        now_ns = monotonic_ns()
        self._reports.refresh(self._sessions.load, self._runs.units, now_ns)
        self._sessions.tick(now_ns)
        self._send()

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _obey_all(self, orders: Sequence[Order]) -> None:
        for order in orders:
            self._obey(order)

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._runs.begin(order, self._served)
        elif isinstance(order, Stop):
            self._runs.stop(order.request_id)
        elif isinstance(order, Spoiled):
            self._log("backend_error", **self._sessions.log_names(order.request_id), error=order.error.message)
        elif isinstance(order, Registered):
            self._was_registered = True
            self._log("registered", worker=self.config.name, models=self._served.names)
            if self._on_ready is not None:
                self._on_ready(self._served.announced)
                self._on_ready = None
        elif isinstance(order, Refused):
            self._log("refused", error=str(order.error), code=order.error.code)
            if not order.error.retryable and not self._sessions.registered:
                self.die(order.error)
        elif isinstance(order, Faulted):
            self._log("fault", error=str(order.error), code=order.error.code)
        elif isinstance(order, DrainAsked):
            self._drain_asked = self._loop.create_task(self._drain_within(order.limit_ms or None))
        elif isinstance(order, DrainWithdrawn):
            self._stay()

    # ── from engines ────────────────────────────────────────────────────────────────────────────────────────────────

    def emit_step(self, step: Iterable[tuple[str, Delta]]) -> None:
        """Take a step of an engine that hands over all of its requests at once: it leaves now."""
        self._runs.emit(list(step))
        self._flush()

    def emit_columns(self, step: Columns, others: Iterable[tuple[str, Delta]]) -> None:
        """As `emit_step`, most of the step as columns."""
        self._runs.emit_columns(step)
        rest = list(others)
        if rest:
            self._runs.emit(rest)
        self._flush()

    def fail(self, request_id: str, error: BaseException) -> None:
        """A step-wise engine gives up on one request."""
        self._runs.fail(request_id, error)

    def die(self, error: BaseException, backend: BaseModelWorker | None = None) -> None:
        """An engine is gone: its requests fail over, and `run` raises."""
        self._log("engine_died", error=sound_text(error))
        # Said before its requests are given up: what goes on elsewhere must not be sent here once more.
        self._sessions.drain(monotonic_ns())
        for request_id in self._runs.of(backend):
            self._runs.fail(request_id, WorkerLostError(f"engine died: {sound_text(error)}", worker=self.config.name))
        self._failure = error if isinstance(error, FabricError) else BackendError(f"{type(error).__name__}: {error}")
        self._stopping.set()

    def cache_changed(self, change: CacheChange) -> None:
        """A backend tells what it has cached."""
        self._sessions.cached(change, monotonic_ns())
        self._send()

    def models_changed(self, backend: BaseModelWorker, models: Sequence[ModelInfo]) -> None:
        """Announce another set of models of one backend.

        Raises:
            ConfigurationError: It cannot be announced, which is logged; what was served before still is.
        """
        try:
            self._serve(backend, models)
        except ConfigurationError as error:
            self._log("announcement_refused", backend=type(backend).__name__, error=str(error))
            raise
        self._send()

    def log(self, event: str, **fields: object) -> None:
        """A backend has something to tell the operator."""
        self._log(event, **fields)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _changed(self) -> None:
        """Something is to be sent: it leaves when the loop has turned once, with whatever else comes in that turn."""
        if not self._sessions.busy:
            self._idle.set()
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        orders = self._sessions.flush(monotonic_ns())
        if orders:
            self._obey_all(orders)
        if self._links is not None:
            self._links.send()
        self._outlets.pass_on()
