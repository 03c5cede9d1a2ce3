"""The clock is monotonic, so that setting the wall clock changes nothing. The wall clock names moments of a recording alone."""

from __future__ import annotations

import time

monotonic_ns = time.monotonic_ns
unix_ns = time.time_ns


def local_time(unix_ns: int) -> str:
    """The time of the day here at a moment of the wall clock, to the millisecond."""
    return f"{time.strftime('%H:%M:%S', time.localtime(unix_ns // 1_000_000_000))}.{unix_ns // 1_000_000 % 1_000:03}"
