"""What libzmq tells of connections: its monitor socket, read without blocking."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import zmq

#: The monitor's event frame: event number, then its value.
_EVENT: Final = struct.Struct("=Hi")
#: The status of a handshake that the controller refuses for good; 300 and 500 are troubles of its own.
_STATUS_DENIED: Final = 400


class Happened(IntEnum):
    """What became of a connection.

    * UP: its handshake is done, messages may be sent.
    * DOWN: it is gone; the value is its file descriptor.
    * RETRIED: an attempt to connect has failed.
    * DENIED: the other side does not know this side's key.
    * MISMATCH: one side encrypts, the other does not.
    * WRONG_KEY: the other side has another key in mind than this side's.
    * BROKEN: the handshake ended without a reason that this side could read.
    """

    UP = 1
    DOWN = 2
    RETRIED = 3
    DENIED = 4
    MISMATCH = 5
    WRONG_KEY = 6
    BROKEN = 7


_PLAIN: Final = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): Happened.UP,
    int(zmq.EVENT_DISCONNECTED): Happened.DOWN,
    int(zmq.EVENT_CONNECT_RETRIED): Happened.RETRIED,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): Happened.BROKEN,
}
_BY_VALUE: Final = {
    (int(zmq.EVENT_HANDSHAKE_FAILED_AUTH), _STATUS_DENIED): Happened.DENIED,
    (int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL), int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)): Happened.MISMATCH,
    (int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL), int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)): Happened.WRONG_KEY,
}
_MASK: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL) | sum(_PLAIN)


class Monitor:
    """Reads connection events of one socket.

    Args:
        socket: The socket to watch; call before it binds or connects.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._watched = socket
        self._pair = socket.get_monitor_socket(_MASK)
        # A pipe signals a sleeping reader only, and a reader sleeps once it has found nothing: so look once, or the
        # first event of all never shows at the file descriptor.
        self.read()

    @property
    def fd(self) -> int:
        """File descriptor that becomes readable when events may have arrived (edge-triggered)."""
        return int(self._pair.getsockopt(zmq.FD))

    def read(self) -> list[tuple[Happened, int]]:
        """All events since the last call, with their values."""
        events: list[tuple[Happened, int]] = []
        while True:
            try:
                event, value = _EVENT.unpack(self._pair.recv(zmq.NOBLOCK))
            except zmq.Again:
                return events
            self._pair.recv(zmq.NOBLOCK)
            happened = _PLAIN.get(event) or _BY_VALUE.get((event, value), Happened.BROKEN)
            events.append((happened, value))

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self._pair.close(linger=0)
