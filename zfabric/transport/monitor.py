"""What libzmq tells of connections: its monitor socket, read without blocking."""

from __future__ import annotations

import struct
from typing import Final

import zmq

#: The monitor's event frame: event number, then its value.
_EVENT: Final = struct.Struct("=Hi")
_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED

UP: Final = 1
DOWN: Final = 2
#: The controller does not know this peer's key.
DENIED: Final = 3


class Monitor:
    """Reads connection events of one socket.

    Args:
        socket: The socket to watch; call before it binds or connects.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._watched = socket
        self._pair = socket.get_monitor_socket(_EVENTS)
        # A pipe signals a sleeping reader only, and a reader sleeps once it has found nothing: so look once, or the
        # first event of all never shows at the file descriptor.
        self.read()

    @property
    def fd(self) -> int:
        """File descriptor that becomes readable when events may have arrived (edge-triggered)."""
        return int(self._pair.getsockopt(zmq.FD))

    def read(self) -> list[tuple[int, int]]:
        """All events since the last call, as (UP, DOWN or DENIED, the connection's file descriptor)."""
        events: list[tuple[int, int]] = []
        while True:
            try:
                event, value = _EVENT.unpack(self._pair.recv(zmq.NOBLOCK))
            except zmq.Again:
                return events
            self._pair.recv(zmq.NOBLOCK)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                events.append((UP, value))
            elif event == zmq.EVENT_DISCONNECTED:
                events.append((DOWN, value))
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                events.append((DENIED, value))

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self._pair.close(linger=0)
