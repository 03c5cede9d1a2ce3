"""A gateway on the test's own event loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from tests.endpoints import ipc, run_directory
from zfabric import AsyncClient, BaseModelWorker
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.server import Gateway
from zfabric.testing import serving

__all__ = ["ipc", "run_directory"]


@dataclass
class Served:
    """What a test has of it.

    Attributes:
        url: Where the gateway listens.
        gateway: Itself.
        fabric: A client of the fabric behind it.
        openai: OpenAI's own client, which tries nothing twice.
        logged: What the gateway logged.
    """

    url: str
    gateway: Gateway
    fabric: AsyncClient
    openai: AsyncOpenAI
    logged: list[tuple[str, dict[str, Any]]]


@contextlib.asynccontextmanager
async def gateway(*backends: BaseModelWorker, **settings: Any) -> AsyncIterator[Served]:
    """Backends, a fabric, a gateway at a free port, and a client."""
    logged: list[tuple[str, dict[str, Any]]] = []

    def log(event: str, **fields: Any) -> None:
        logged.append((event, fields))

    async with serving(*backends) as fabric:
        config = GatewayConfig(**{"port": 0, "drain_ms": 5_000, **settings})
        async with Gateway(config, lambda _: AsyncClient(fabric.endpoint), log) as made:
            client = AsyncOpenAI(base_url=f"{made.url}/v1", api_key="sk-test", max_retries=0)
            async with client:
                yield Served(made.url, made, fabric, client, logged)
