"""Logs that a person and a machine can read: coloured lines on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from zfabric import limits
from zfabric.cli.log_events import EVENTS

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def make_logger(name: str, level: LogLevel, form: LogFormat) -> structlog.typing.FilteringBoundLogger:
    """A logger on standard error. "auto" is console on a terminal, else JSON."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    if not console:
        # Progress bars of the libraries that load models would stand between the lines that a program reads.
        os.environ.setdefault("TQDM_DISABLE", "1")
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not console),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return logger


class RateLimit:
    """How many lines of each event are written: LOG_LINES_MAX in LOG_WINDOW_MS. The first line after that says how many were
    left out.

    Example:
        >>> limit = RateLimit()
        >>> limit.take("worker_lost", now_s=0.0)
        0
    """

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}

    def take(self, event: str, now_s: float) -> int | None:
        """Whether a line may be written now.

        Args:
            event: Its name.
            now_s: Seconds of a clock that only goes forward.

        Returns:
            Lines of this event that were left out before it; None if this one is left out too.
        """
        window = self._windows.get(event)
        if window is None:
            window = self._windows[event] = _Window(now_s)
        elif now_s - window.since_s >= limits.LOG_WINDOW_MS / 1_000:
            window.since_s, window.written = now_s, 0
        if window.written >= limits.LOG_LINES_MAX:
            window.left_out += 1
            return None
        window.written += 1
        left_out, window.left_out = window.left_out, 0
        return left_out


@dataclass(slots=True)
class _Window:
    """Lines of one event since some time."""

    since_s: float
    written: int = 0
    left_out: int = 0


def events(
    log: structlog.typing.FilteringBoundLogger, *, clock: Callable[[], float] = time.monotonic
) -> Callable[..., Any]:
    """What services log with: `(event, **fields)`, at the level that the event has, and not more often than anybody wants to
    read."""
    limit = RateLimit()

    def write(event: str, **fields: Any) -> None:
        left_out = limit.take(event, clock())
        if left_out is None:
            return
        if left_out:
            fields["left_out_before"] = left_out
        known = EVENTS.get(event)
        level = known.level if known is not None else "info"
        log.log(getattr(logging, level.upper()), event, **fields)

    return write
