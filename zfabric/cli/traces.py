"""The traces of a daemon, where its operator wants some."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from zfabric.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


@contextlib.asynccontextmanager
async def traces_to(endpoint: str | None, service: str, instance: str = "") -> AsyncIterator[TracerProvider | None]:
    """A provider of spans within a block, which exports what is left at its end.

    Args:
        endpoint: Of a collector, or "env"; None for no traces, which costs nothing and imports nothing.
        service: The daemon's name.
        instance: Which of several it is.

    Raises:
        ConfigurationError: It is no endpoint, or OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        module = importlib.import_module("zfabric.tracing.provider")
    except ImportError as error:
        raise ConfigurationError(f"--traces needs {error.name}: pip install 'zfabric[tracing]'") from None
    provider: TracerProvider = module.provider_of(service, endpoint, instance)
    try:
        yield provider
    finally:
        # It waits for the collector, which must not keep anybody else of this loop.
        await asyncio.to_thread(provider.shutdown)
