"""Reading a large body to where it stays: the protocol of a connection while one is on its way.

asyncio gives what it read as a new object; for a large body that is a copy, and the object of a read another one. A protocol that
lends a buffer has neither, but costs small messages a call and a copy more. So a connection changes from the one to the
other when a large body has begun, and back when it is whole: the buffer that is lent ends where the body does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zfabric.transport.loop_wire import Wire


class BodyReader(asyncio.BufferedProtocol):
    """Lends the transport room for what is missing of a body; all else is the wire's.

    Args:
        wire: Whose connection it is.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._reader = wire.connection.reader

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._wire.body_read(nbytes)

    def pause_writing(self) -> None:
        self._wire.pause_writing()

    def resume_writing(self) -> None:
        self._wire.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.connection_lost(exc)
