"""Where the tests' controllers listen."""

from tests.endpoints import ipc, run_directory

__all__ = ["ipc", "run_directory"]
