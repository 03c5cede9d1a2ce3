"""Endpoints, and settings that do not come from whoever runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.endpoints import ipc, run_directory

__all__ = ["ipc", "run_directory"]


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        # An engine with traces leaves variables of OpenTelemetry behind in the process that had it.
        if name.startswith(("ZFABRIC_", "OTEL_")) and name != "ZFABRIC_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
