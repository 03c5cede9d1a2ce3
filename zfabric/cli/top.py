"""zfabric top: the live view of a fabric."""

from __future__ import annotations

import asyncio
import importlib
import sys

from zfabric.cli.options import Config, Endpoint, Transport
from zfabric.client.aio import AsyncClient
from zfabric.errors import ConfigurationError
from zfabric.transport.endpoints import default_endpoint


def top(
    *,
    endpoint: Endpoint = None,
    transport: Transport = None,
    config: Config = None,
) -> None:
    """Watch a fabric live: workers, models and requests, with keys to sort, filter, drain and cancel; q ends it.

    **Examples**

    `zfabric top` · `zfabric top --endpoint tcp://10.0.0.5:9000`
    """
    del config
    if not sys.stdout.isatty():
        raise ConfigurationError(
            "zfabric top needs a terminal; for programs there are zfabric status --json and --metrics"
        )
    try:
        view = importlib.import_module("zfabric.top.app")
    except ImportError as error:
        raise ConfigurationError(f"zfabric top needs {error.name}: pip install 'zfabric[cli]'") from None

    async def watch() -> None:
        async with AsyncClient(endpoint, label="zfabric top", transport=transport) as client:
            await view.Top(client, endpoint or default_endpoint()).run_async()

    asyncio.run(watch())
