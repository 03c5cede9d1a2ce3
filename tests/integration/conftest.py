"""Endpoints of both transports, and the loops that tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.endpoints import endpoint, ipc, run_directory, transport

__all__ = ["endpoint", "ipc", "run_directory", "transport"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Drivers are tested on the loop that daemons run on, all else on asyncio's own, as users of the library may; large
    bodies, which transports read and write in ways of their own, on both."""
    on_uvloop = item.path.name in ("test_transports.py", "test_large_bodies.py")
    on_asyncio = item.path.name != "test_transports.py"
    uvloops = {"uvloop": uvloop.new_event_loop} if on_uvloop else {}
    return {**uvloops, "asyncio": asyncio.new_event_loop} if on_asyncio else uvloops
