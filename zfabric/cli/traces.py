"""The traces of a daemon, where its operator wants some."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

from zfabric.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


#: Whatever OpenTelemetry has to say, it says below this name.
_THEIRS: Final = "opentelemetry"


class _Told(logging.Handler):
    """Passes on to the daemon's log what OpenTelemetry complains of, from whatever thread."""

    def __init__(self, log: Callable[..., Any]) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        # The loop may be closed before the exporter's thread has ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._write, record.getMessage())

    def _write(self, message: str) -> None:
        self._log("traces_failed", error=message)


@contextlib.asynccontextmanager
async def traces_to(
    endpoint: str | None, service: str, log: Callable[..., Any], instance: str = ""
) -> AsyncIterator[TracerProvider | None]:
    """A provider of spans within a block, which exports what is left at its end.

    Args:
        endpoint: Of a collector, or "env"; None for no traces, which costs nothing and imports nothing.
        service: The daemon's name.
        log: Called with an event and its fields.
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
    told = _Told(log)
    logging.getLogger(_THEIRS).addHandler(told)
    try:
        yield provider
    finally:
        # It waits for the collector, which must not keep anybody else of this loop.
        await asyncio.to_thread(provider.shutdown)
        logging.getLogger(_THEIRS).removeHandler(told)
