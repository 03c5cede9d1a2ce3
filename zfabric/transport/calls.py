"""A socket's calls as the hot loops need them: pyzmq's compiled ones, and plain numbers for flags.

`zmq.Socket` wraps `send` in Python for draft sockets, and its flags are enums: both cost about as much as the call itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import zmq

#: Flags of a frame that others of its message follow, and of a message's last one.
MORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
LAST: Final = int(zmq.NOBLOCK)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)


class Calls(NamedTuple):
    """Bound calls: send(data, flags, copy), receive(flags, copy), option(number)."""

    send: Callable[..., Any]
    receive: Callable[..., Any]
    option: Callable[[int], Any]


def calls_of(socket: zmq.Socket[bytes]) -> Calls:
    """The calls of one socket."""
    compiled: Any = super(zmq.Socket, socket)
    return Calls(compiled.send, compiled.recv, compiled.get)
