"""Endpoints of both kinds, and the drivers that serve them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from zfabric.transport.links import TRANSPORT_VARIABLE, TRANSPORTS, Transport, choose


@pytest.fixture
def run_directory() -> Iterator[Path]:
    """A short path with mode 0700: pytest's own are too long for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="zf-") as name:
        yield Path(name)


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, run_directory: Path) -> str:
    """Where a test's controller listens."""
    return f"ipc://{run_directory}/c.sock" if request.param == "ipc" else "tcp://127.0.0.1:*"


@pytest.fixture
def ipc(run_directory: Path) -> str:
    """The same for tests that one transport is enough for."""
    return f"ipc://{run_directory}/c.sock"


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Transport:
    """Has a test run on each driver, its child processes included. Tests without it run on the default one."""
    monkeypatch.setenv(TRANSPORT_VARIABLE, request.param)
    return choose(None)
