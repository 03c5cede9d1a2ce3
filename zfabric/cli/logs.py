"""Logs that a person and a machine can read: coloured lines on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Final, Literal

import structlog

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

#: Services name what happened; how much it matters to an operator is said here. Everything else is info.
_LEVELS: Final[dict[str, int]] = {
    "bad_load_report": logging.WARNING,
    "bad_message": logging.WARNING,
    "disconnected": logging.WARNING,
    "drain_limit_reached": logging.WARNING,
    "fault": logging.WARNING,
    "file_limit_low": logging.WARNING,
    "engine_restarted": logging.WARNING,
    "accepting_paused": logging.WARNING,
    "handshake_failed": logging.WARNING,
    "refused": logging.WARNING,
    "stop_limit_reached": logging.WARNING,
    "abort_failed": logging.ERROR,
    "announcement_refused": logging.ERROR,
    "backend_error": logging.ERROR,
    "close_failed": logging.ERROR,
    "engine_died": logging.ERROR,
    "internal_error": logging.ERROR,
    "policy_failed": logging.ERROR,
    "reload_failed": logging.ERROR,
}


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


def events(log: structlog.typing.FilteringBoundLogger) -> Callable[..., Any]:
    """What services log with: `(event, **fields)`, at the level that the event has."""

    def write(event: str, **fields: Any) -> None:
        log.log(_LEVELS.get(event, logging.INFO), event, **fields)

    return write
