"""A TCP connection with a middle that can be cut, as a network's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Proxy:
    """Passes bytes on between whoever connects and one endpoint, until it is cut.

    Attributes:
        endpoint: What to connect to instead.
    """

    def __init__(self, target: str) -> None:
        self._port = int(target.rpartition(":")[2])
        self._pipes: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.endpoint = ""
        self.connections = 0

    def cut(self) -> None:
        """Lose all connections, with what is on its way. New ones may be made at once."""
        for writer in self._pipes:
            writer.transport.abort()
        self._pipes.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.connections += 1
        self._pipes |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()


@contextlib.asynccontextmanager
async def proxy(target: str) -> AsyncIterator[Proxy]:
    """A proxy before a tcp endpoint of this host."""
    made = Proxy(target)
    server = await asyncio.start_server(made._accept, "127.0.0.1", 0)
    made.endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        made.cut()
        await asyncio.gather(*made._tasks, return_exceptions=True)
        await server.wait_closed()
