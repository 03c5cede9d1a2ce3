"""A ModelWorker behind a controller, both as processes, with a probe in the worker's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.engines.answers import WORKER
from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.transport.links import Transport
from zfabric.wire.payloads import OperateRequest

TIMER_S = 0.01


class ProbedWorker(ModelWorker):
    """A ModelWorker whose event loop is watched from within: its call `lateness` gives what was noted since the last."""

    async def load(self) -> Any:
        found = await super().load()
        self._late: list[float] = []
        self._probe = asyncio.create_task(self._note())
        return found

    async def _note(self) -> None:
        while True:
            due = time.perf_counter() + TIMER_S
            await asyncio.sleep(TIMER_S)
            self._late.append(max(0.0, time.perf_counter() - due))

    async def operate(self, request: OperateRequest) -> Any:
        if request.call != "lateness":
            return await super().operate(request)
        late, self._late = self._late, []
        return late

    async def close(self) -> None:
        self._probe.cancel()
        await super().close()


@contextlib.asynccontextmanager
async def served(model: Path, *arguments: str, transport: Transport) -> AsyncIterator[AsyncClient]:
    """A client of a controller with one worker, all three on one driver."""
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        endpoint = f"ipc://{name}/c.sock"
        async with processes(Path(name)) as children:

            async def start(module: str, *more: str) -> None:
                common = ("--endpoint", endpoint, "--transport", transport)
                child = await Process.start(module, *common, *more, directory=Path(name))
                children.append(child)
                await child.ready()

            await start("zfabric.cli.controller")
            backend = f"{ProbedWorker.__module__}:{ProbedWorker.__qualname__}"
            await start(
                "zfabric.cli.worker", "--name", WORKER, "--backend", backend, "--model", str(model),
                "--model-names", WORKER, "--context-length", "4096", *arguments,
            )  # fmt: skip
            async with AsyncClient(endpoint, transport=transport) as client:
                yield client
