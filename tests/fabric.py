"""Real controllers, workers and clients for tests: as processes, or on the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zfabric import AsyncClient, BaseModelWorker
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.controller.config import CellConfig, ControllerConfig
from zfabric.controller.service import Controller
from zfabric.core.controller.config import BrokerConfig
from zfabric.core.controller.spans import AttemptSpan
from zfabric.worker.config import WorkerConfig
from zfabric.worker.service import Log, WorkerService
from zfabric.worker.traces import Traces


@dataclass
class Fabric:
    """A controller and workers on the test's own event loop."""

    endpoint: str
    controller: Controller
    services: dict[str, WorkerService] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def add_worker(
        self, name: str, *backends: BaseModelWorker, traces: Traces | None = None, log: Log | None = None, **config: Any
    ) -> WorkerService:
        """Start a worker and wait until it is registered."""
        ready = asyncio.Event()
        service = WorkerService(
            backends or [EchoWorker()],
            WorkerConfig(endpoint=self.endpoint, name=name, **config),
            on_ready=lambda _: ready.set(),
            traces=traces,
            log=log,
        )
        self.services[name] = service
        task = self.tasks[name] = asyncio.create_task(service.run())
        waiter = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if task.done():
            await task
        return service

    async def remove_worker(self, name: str) -> None:
        """Drain a worker and wait until it is gone."""
        await self.services.pop(name).drain()
        await self.tasks.pop(name)


@contextlib.asynccontextmanager
async def fabric(
    endpoint: str,
    *,
    traces: Callable[[list[AttemptSpan]], None] | None = None,
    cell: CellConfig | None = None,
    log: Log | None = None,
    **broker: Any,
) -> AsyncIterator[Fabric]:
    """A controller, no workers yet. At the end all must be at rest: no request anywhere."""
    broker.setdefault("recovery_ms", 0)
    config = ControllerConfig(endpoints=(endpoint,), broker=BrokerConfig(**broker), cell=cell)
    async with Controller(config, traces=traces, log=log) as controller:
        made = Fabric(controller.endpoints[0], controller)
        try:
            yield made
            await at_rest(controller)
        finally:
            for name in list(made.services):
                await made.remove_worker(name)
        assert controller.rescued == 0


async def at_rest(controller: Controller) -> None:
    """Wait until no request is anywhere, and check that no table has kept one."""
    broker = controller.broker
    async with asyncio.timeout(10):
        while any(worker.live for worker in broker.registry.workers.values()) or broker.in_flight:
            await asyncio.sleep(0.005)
    assert not broker.routes.table
    assert not broker.routes.remote
    assert not any(model.queue for model in broker.registry.models.values())
    assert broker.scheduler.figures.queued_bytes == 0


@contextlib.asynccontextmanager
async def echo_fabric(
    endpoint: str, *, workers: int = 1, options: EchoOptions | None = None, **broker: Any
) -> AsyncIterator[tuple[Fabric, AsyncClient]]:
    """A fabric with echo workers and one client."""
    async with fabric(endpoint, **broker) as made:
        for number in range(workers):
            await made.add_worker(f"w{number}", EchoWorker(options))
        async with AsyncClient(made.endpoint) as client:
            yield made, client


class Process:
    """A command of the project as a child process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @classmethod
    async def start(
        cls, module: str, *arguments: str, directory: Path, prefix: tuple[str, ...] = (), **environment: str
    ) -> Process:
        """Start `python -m module arguments`, or have the command `prefix` start it."""
        log = directory / f"{module}-{len(list(directory.iterdir()))}.log"
        with log.open("w") as errors:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                sys.executable,
                "-m",
                module,
                *arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        return cls(process, log)

    async def ready(self, timeout_s: float = 240) -> str:
        """Wait for the ready message."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = (await self.process.stdout.readline()).decode()
        assert line.startswith("ready"), f"{line!r}\n{self.log.read_text()}"
        return line.strip()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def ended(self, timeout_s: float = 20) -> int:
        """Wait for the end. Returns the exit code."""
        async with asyncio.timeout(timeout_s):
            if self.process.stdout is not None:
                await self.process.stdout.read()
            return await self.process.wait()


@contextlib.asynccontextmanager
async def processes(directory: Path) -> AsyncIterator[list[Process]]:
    """A list of children; whatever is still in it and alive at the end is killed."""
    children: list[Process] = []
    try:
        yield children
    finally:
        for child in children:
            if child.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill(signal.SIGCONT)
                    child.kill()
                await child.ended()


def words(prompt: str, count: int) -> str:
    """What echo answers."""
    parts = prompt.split()
    return "".join(parts[position % len(parts)] + " " for position in range(count))
