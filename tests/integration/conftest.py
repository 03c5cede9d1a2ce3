"""Endpoints of both transports."""

from tests.endpoints import endpoint, ipc, run_directory

__all__ = ["endpoint", "ipc", "run_directory"]
