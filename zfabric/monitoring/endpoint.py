"""The HTTP port on which a daemon's figures are read.

It is served by a thread of its own, with the standard library's server and prometheus_client's application: a scraper that is
slow, or one that comes often, holds up a thread and not the loop. The loop copies what it alone may look
through, in one call, and all else, which takes most of the time, is the thread's.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.limits import SCRAPE_MS, SCRAPE_PAUSE_US, SCRAPE_SAMPLES
from zfabric.monitoring.families import histogram
from zfabric.monitoring.lag import LoopLag

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication


class _Sliced(list[Sample]):
    """Samples, between which the thread that writes them lets go of the interpreter now and then."""

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__()):
            if number % SCRAPE_SAMPLES == SCRAPE_SAMPLES - 1:
                # To let go of it for no time at all gives it to nobody: whoever waits for it has to wake up first.
                time.sleep(SCRAPE_PAUSE_US / 1e6)
            yield sample


class _OnLoop(Collector):
    """Gathers figures on a loop, for a thread that asks."""

    def __init__(self, gather: Callable[[], Iterable[Metric]], loop: asyncio.AbstractEventLoop) -> None:
        self._gather = gather
        self._loop = loop

    def describe(self) -> list[Metric]:
        # Nothing is gathered while the registry is made: the loop that would do it is the one that waits.
        return []

    def collect(self) -> Iterator[Metric]:
        async def gathered() -> Iterable[Metric]:
            return self._gather()

        asked = asyncio.run_coroutine_threadsafe(gathered(), self._loop)
        for family in asked.result(SCRAPE_MS / 1_000):
            family.samples = _Sliced(family.samples)
            yield family
            time.sleep(SCRAPE_PAUSE_US / 1e6)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    # A connection that sends nothing holds its thread for so long.
    timeout = SCRAPE_MS / 1_000

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the name that the base class has
        """A scrape is no news."""


class MetricsEndpoint:
    """Serves `/metrics` until it is closed.

    Args:
        address: (host, port) to listen on; port 0 takes a free one.
        gather: Called on the running loop at each scrape. What it returns is read on another thread: an iterator that does
            its work there holds nobody up.
        around: Puts other paths in front of the application that serves metrics.

    Raises:
        EndpointInUseError, ConfigurationError: The address cannot be had.

    Example:
        >>> with MetricsEndpoint(("127.0.0.1", 9464), lambda: metrics_of(controller)) as endpoint:
        ...     print(endpoint.url)
        http://127.0.0.1:9464/metrics
    """

    def __init__(
        self,
        address: tuple[str, int],
        gather: Callable[[], Iterable[Metric]],
        *,
        around: Callable[[WSGIApplication], WSGIApplication] = lambda metrics: metrics,
    ) -> None:
        self._lag = lag = LoopLag()

        def all_of_it() -> Iterable[Metric]:
            lateness = histogram("zfabric_loop_lag_seconds", "How late the event loop is.", {(): lag.measured})
            return itertools.chain(gather(), (lateness,))

        registry = CollectorRegistry()
        registry.register(_OnLoop(all_of_it, asyncio.get_running_loop()))
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        host, port = address
        try:
            kind = _Server6 if ":" in host else _Server
            application = around(make_wsgi_app(registry))
            self._server = make_server(host, port, application, server_class=kind, handler_class=_Quiet)
        except OSError as error:
            lag.stop()
            raise _unusable(host, port, error) from None
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is read."""
        host, port = self._server.server_address[:2]
        name = str(host)
        return f"http://[{name}]:{port}/metrics" if ":" in name else f"http://{name}:{port}/metrics"

    def close(self) -> None:
        """Stop. Safe to call twice."""
        self._lag.stop()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> MetricsEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_address(text: str) -> tuple[str, int]:
    """`PORT`, `HOST:PORT` or `[HOST]:PORT`; without a host it is loopback.

    Raises:
        ConfigurationError: It is none of them.

    Example:
        >>> parse_address("9464")
        ('127.0.0.1', 9464)
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65_535 or (":" in host and not host.startswith("[")):
        raise ConfigurationError(f"{text!r} is no address for metrics: PORT, HOST:PORT or [HOST]:PORT is wanted")
    return host.strip("[]") or "127.0.0.1", int(port)


def _unusable(host: str, port: int, error: OSError) -> ConfigurationError | EndpointInUseError:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        return EndpointInUseError(
            f"metrics cannot be served at {where}: something listens there already", endpoint=where
        )
    return ConfigurationError(f"metrics cannot be served at {where}: {error.strerror or error}", endpoint=where)
