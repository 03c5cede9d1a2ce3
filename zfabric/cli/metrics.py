"""The metrics of a daemon, where its operator wants some."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from zfabric.controller.service import Controller
from zfabric.errors import ConfigurationError
from zfabric.gateway.figures import Figures
from zfabric.monitoring.live import LiveView
from zfabric.monitoring.pages import with_pages
from zfabric.worker.service import WorkerService


@contextlib.contextmanager
def metrics_at(
    address: str | None, of: Literal["controller", "gateway", "worker"], subject: Controller | Figures | WorkerService
) -> Iterator[dict[str, str]]:
    """Serve the metrics of a daemon within a block.

    Args:
        address: PORT or HOST:PORT; None for no metrics, which costs nothing and imports nothing.
        of: What the daemon is: which module of `zfabric.monitoring` reads its figures.
        subject: The daemon's service, or what it counts.

    Yields:
        What is told when the daemon is ready: where they are.

    Raises:
        ConfigurationError, EndpointInUseError: They cannot be served there, or prometheus-client is not installed.
    """
    if address is None:
        yield {}
        return
    try:
        endpoint = importlib.import_module("zfabric.monitoring.endpoint")
        figures = importlib.import_module(f"zfabric.monitoring.{of}")
    except ImportError as error:
        raise ConfigurationError(f"--metrics needs {error.name}: pip install 'zfabric[metrics]'") from None
    where, gather = endpoint.parse_address(address), partial(figures.metrics_of, subject)
    with contextlib.ExitStack() as held:
        served = endpoint.MetricsEndpoint(where, gather, **_pages(subject, held))
        held.enter_context(served)
        yield {"metrics": served.url}


def _pages(subject: object, held: contextlib.ExitStack) -> dict[str, Any]:
    """Beside a controller's metrics there is a page of live figures."""
    if not isinstance(subject, Controller):
        return {}
    view = LiveView(subject)
    held.callback(view.close)
    return {"around": with_pages(view)}
