"""Whether a path to a peer has died, as far as the kernel knows.

A peer that says nothing may be gone, or busy: an event loop that waits for an engine, or for whoever holds the interpreter,
answers no PING. Its kernel answers all the same, so a path on which the peer's kernel acknowledges what is sent is alive.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final

#: The beginning of Linux's struct tcp_info: of its eight octets the probes of a closed window that were not answered; of the
#: words that follow, segments that are not acknowledged, and milliseconds since the last acknowledgement.
_TCP_INFO: Final = struct.Struct("=3xB4x16xI28xI")
_TCP_INFO_OPTION: Final[int | None] = getattr(socket, "TCP_INFO", None)


def is_dead(connected: Any, silence_ms: int) -> bool | None:
    """Whether the other end's kernel has acknowledged nothing for so long, although it should have.

    Args:
        connected: A socket, or what stands for one at a transport.
        silence_ms: How long.

    Returns:
        False for a Unix socket, which has no path that could die; None where the system does not tell.
    """
    try:
        if connected.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        if _TCP_INFO_OPTION is None:
            return None
        told = connected.getsockopt(socket.IPPROTO_TCP, _TCP_INFO_OPTION, _TCP_INFO.size)
        probes, unacknowledged, acknowledged_ms = _TCP_INFO.unpack(told)
    except (OSError, AttributeError, struct.error):
        return None
    # A reader whose window is closed acknowledges probes, which come ever more rarely.
    return bool(acknowledged_ms >= silence_ms and (unacknowledged or probes > 1))
