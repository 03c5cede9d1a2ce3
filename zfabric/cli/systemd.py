"""What systemd wants to hear of a service of `Type=notify`: that it is ready, that it stops, and that its loop turns.

The protocol is sd_notify(3)'s: one datagram of `NAME=value` lines to the socket that $NOTIFY_SOCKET names. Without that variable
nothing is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

SOCKET_VARIABLE: Final = "NOTIFY_SOCKET"
_WATCHDOG_VARIABLE: Final = "WATCHDOG_USEC"
_WATCHDOG_PROCESS_VARIABLE: Final = "WATCHDOG_PID"


def notify(**state: object) -> None:
    """Tell the service manager something, such as `READY=1`. One that does not listen is no reason to end."""
    address = os.environ.get(SOCKET_VARIABLE, "")
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    lines = "\n".join(f"{name}={value}" for name, value in state.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        # A leading @ stands for the zero byte of an abstract address.
        sender.sendto(lines.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def watch() -> None:
    """Have the running loop feed the watchdog of this service, if it has one: a loop that stands still does not."""
    period_s = _watchdog_s()
    if period_s is None:
        return
    loop = asyncio.get_running_loop()

    def feed() -> None:
        notify(WATCHDOG=1)
        # sd_watchdog_enabled(3) recommends half of the time.
        loop.call_later(period_s / 2, feed)

    feed()


def _watchdog_s() -> float | None:
    """The watchdog's time in seconds; None where it is off, or another process's."""
    given, process = os.environ.get(_WATCHDOG_VARIABLE, ""), os.environ.get(_WATCHDOG_PROCESS_VARIABLE)
    if not given.isdecimal() or int(given) == 0 or (process is not None and process != str(os.getpid())):
        return None
    return int(given) / 1e6
