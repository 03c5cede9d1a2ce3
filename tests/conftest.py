"""What all tests share."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, Final

import pytest

#: Files that share engines, which take their time to start.
_TOGETHER: Final = "tests/backends/vllm_engine/"
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, one runs all tests of a file, or of files that share what takes its time to start."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _TOGETHER if nodeid.startswith(_TOGETHER) else nodeid.partition("::")[0]

    return ByFile(config, log)
