"""Controllers below controllers, for tests: on the test's own loop, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.fabric import Fabric, fabric
from zfabric import Credentials
from zfabric.controller.config import CellConfig
from zfabric.worker.service import Log

TCP = "tcp://127.0.0.1:*"


@contextlib.asynccontextmanager
async def cell_of(
    parent: str, name: str, *, log: Log | None = None, credentials: Credentials | None = None, **broker: Any
) -> AsyncIterator[Fabric]:
    """A controller that is registered at the one of this endpoint, with no workers yet."""
    config = CellConfig(parent=parent, name=name, credentials=credentials)
    async with fabric(TCP, cell=config, log=log, **broker) as made:
        yield made


async def until(holds: Callable[[], object], limit_s: float = 10) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.002)


async def served(made: Fabric, *models: str, by: int = 1) -> None:
    """Wait until a controller has so many workers or cells for each of these models."""
    known = made.controller.broker.registry.models
    await until(lambda: all(len(known[name].hosts) == by if name in known else not by for name in models))
