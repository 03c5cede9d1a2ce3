"""Notices engines that hang, and such that move again: each of a worker's engines for itself."""

from __future__ import annotations

from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.endings import Endings
from zfabric.core.controller.journal import Journal
from zfabric.core.controller.peers import Engine, WorkerPeer, WorkerState
from zfabric.core.controller.registry import Registry
from zfabric.ids import milliseconds
from zfabric.wire.load import Load


class EngineWatch:
    """Takes load reports."""

    def __init__(self, config: BrokerConfig, registry: Registry, endings: Endings, journal: Journal) -> None:
        self._config = config
        self._registry = registry
        self._endings = endings
        self._journal = journal
        #: Reports that came later than after two intervals.
        self.late_beats = 0

    def report(self, worker: WorkerPeer, load: Load, now_ns: int) -> None:
        """A worker says how it is."""
        if worker.reported_ns and now_ns - worker.reported_ns > 2 * milliseconds(self._config.beat_ms):
            self.late_beats += 1
        worker.reported_ns = now_ns
        self._record(worker, load)
        self._registry.revision += load.slots != worker.load.slots
        worker.load = load
        # A worker that does not tell of its engines has one.
        counters = dict(enumerate(load.engines or [load.progress]))
        for index, engine in worker.engines.items():
            self._look(worker, engine, counters.get(index), now_ns)
        for line in load.streams:
            request = worker.live.get((line.instance, line.request, line.attempt))
            if request is not None:
                request.units = max(request.units, line.units)
        if load.cached:
            self._registry.placement.told(worker.hosts, load.cached)
        # Told once: it would only keep memory.
        load.streams, load.cached = [], []
        self.judge(worker)

    def _record(self, worker: WorkerPeer, load: Load) -> None:
        """A recording has loads that differ from the one before: an idle fabric records nothing."""
        recorder, before = self._journal.recorder, worker.load
        if recorder is None or (load.running, load.waiting, load.slots, load.draining) == (
            before.running, before.waiting, before.slots, before.draining
        ):  # fmt: skip
            return
        recorder.record(
            "load",
            (
                worker.name,
                load.running,
                load.waiting,
                load.slots,
                worker.in_flight,
                load.tokens_per_second,
                load.draining,
            ),
        )

    def judge(self, worker: WorkerPeer) -> None:
        """A worker gets nothing new while itself or an operator wants so, and work otherwise."""
        operator = worker.leaves_for or self._registry.directives.held.get(worker.name, "")
        drains = bool(operator) or worker.load.draining
        before, worker.state = worker.state, WorkerState.DRAINING if drains else WorkerState.READY
        self._registry.revision += worker.state is not before
        if drains and before is not WorkerState.DRAINING:
            by = f"operator {operator}" if operator else "worker"
            self._journal.note("worker_draining", worker=worker.name, by=by, in_flight=worker.in_flight)
        self._registry.refresh(worker)

    def _look(self, worker: WorkerPeer, engine: Engine, progress: int | None, now_ns: int) -> None:
        """An engine that has work hangs if its counter stands still for too long; one that tells none is not judged. It hangs
        until it moves, or has stopped all that it was told to stop."""
        moved = progress is None or progress != engine.progress or not engine.live
        engine.progress = progress
        if moved:
            engine.moved_ns = now_ns
            if engine in worker.hung:
                worker.hung.remove(engine)
                self._journal.note("engine_moves", worker=worker.name)
            return
        silent_ms = (now_ns - engine.moved_ns) // 1_000_000
        if silent_ms >= self._config.stall_ms and engine not in worker.hung:
            worker.hung.append(engine)
            self._journal.note("engine_stalled", worker=worker.name, silent_ms=silent_ms, requests=len(engine.live))
            self._endings.engine_stalled(worker, engine, silent_ms)
