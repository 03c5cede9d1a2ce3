"""A backend behind a real controller and a real worker, in the caller's own process: for the tests of its author."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zfabric.client.aio import AsyncClient
    from zfabric.client.sync import Client
    from zfabric.worker.base import BaseModelWorker


@contextlib.asynccontextmanager
async def serving(*backends: BaseModelWorker, **settings: Any) -> AsyncIterator[AsyncClient]:
    """Serve backends on a fabric of their own, on the running event loop, and give a client of it.

    .. code-block:: python

        async with zfabric.testing.serving(MyBackend()) as client:
            completion = await client.generate("mine", "hello", temperature=0)
            assert completion.text == "…"

    Nothing of it is left when the block ends, also when it is cancelled.

    Args:
        *backends: Loaded here, and closed at the end.
        **settings: Of `WorkerConfig`, such as `slots`.

    Raises:
        Exception: Whatever made loading a backend impossible.
    """
    from zfabric.client.aio import AsyncClient

    async with _fabric(backends, settings) as endpoint, AsyncClient(endpoint, label="testing") as client:
        yield client


@contextlib.contextmanager
def run_backend(*backends: BaseModelWorker, **settings: Any) -> Iterator[Client]:
    """As `serving`, for tests that block: the fabric runs on an event loop in a thread of its own.

    .. code-block:: python

        with zfabric.testing.run_backend(MyBackend()) as client:
            assert client.generate("mine", "hello", temperature=0).text == "…"

    Raises:
        Exception: Whatever made loading a backend impossible.
    """
    from zfabric.client.sync import Client

    ready = threading.Event()
    found: list[str] = []
    failed: list[BaseException] = []
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stopping = asyncio.Event()
        stop.append((asyncio.get_running_loop(), stopping))
        async with _fabric(backends, settings) as endpoint:
            found.append(endpoint)
            ready.set()
            await stopping.wait()

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 — it is raised again in the caller's thread
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="zfabric-testing", daemon=True)
    thread.start()
    ready.wait()
    if failed:
        raise failed[0]
    loop, stopping = stop[0]
    try:
        with Client(found[0], label="testing") as client:
            yield client
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stopping.set)
        thread.join()
    if failed:
        raise failed[0]


@contextlib.asynccontextmanager
async def _fabric(backends: tuple[BaseModelWorker, ...], settings: dict[str, Any]) -> AsyncIterator[str]:
    """A controller, and a worker that is ready. Gives the endpoint."""
    from zfabric.controller.config import ControllerConfig
    from zfabric.controller.service import Controller
    from zfabric.core.controller.config import BrokerConfig
    from zfabric.worker.config import WorkerConfig
    from zfabric.worker.service import WorkerService

    with tempfile.TemporaryDirectory(prefix="zf-", ignore_cleanup_errors=True) as directory:
        local = hasattr(socket, "AF_UNIX")
        endpoint = f"ipc://{directory}/c.sock" if local else "tcp://127.0.0.1:*"
        broker = BrokerConfig(recovery_ms=0)
        async with Controller(ControllerConfig(endpoints=(endpoint,), broker=broker)) as controller:
            ready = asyncio.Event()
            config = WorkerConfig(
                **{"endpoint": controller.endpoints[0], "name": "worker", "credentials": None, **settings}
            )
            service = WorkerService(backends, config, on_ready=lambda _: ready.set())
            running = asyncio.create_task(service.run())
            waiting = asyncio.create_task(ready.wait())
            try:
                await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                yield controller.endpoints[0]
                await service.drain(0)
                await running
            finally:
                for task in (running, waiting):
                    task.cancel()
                await asyncio.gather(running, waiting, return_exceptions=True)
