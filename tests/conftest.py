"""What all tests share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

#: Where the test before was.
_directory: Path | None = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is there when a directory's tests begin stays: torch alone is millions of objects, and whoever collects garbage
    to see what is left of his own would look through them all each time."""
    global _directory
    if item.path.parent != _directory:
        _directory = item.path.parent
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """What is frozen would not be freed at the end, and engines complain of that after the runner's last line."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU run wherever one is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
