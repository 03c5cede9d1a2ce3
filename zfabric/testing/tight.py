"""Bounds made so small that a run of some dozens of requests reaches them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zfabric import limits


@contextmanager
def tight(**bounds: int) -> Iterator[None]:
    """Give bounds of `zfabric.limits` other values, wherever in the library they are known by their names.

    What message structs check while they decode stays as it is.
    """
    former: list[tuple[dict[str, Any], str, int]] = []
    try:
        for name, value in bounds.items():
            usual = getattr(limits, name)
            for module_name, module in list(sys.modules.items()):
                if module_name.partition(".")[0] == "zfabric" and vars(module).get(name) == usual:
                    former.append((vars(module), name, usual))
                    vars(module)[name] = value
        yield
    finally:
        for namespace, name, usual in former:
            namespace[name] = usual
