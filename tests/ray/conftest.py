"""Endpoints, and settings that do not come from whoever runs the tests."""

from __future__ import annotations

from tests.cli.conftest import _no_settings_of_the_user
from tests.endpoints import ipc, run_directory

__all__ = ["_no_settings_of_the_user", "ipc", "run_directory"]
