"""Other values for names of the library: bounds that a run of some dozens of requests reaches, and a world to run in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def substituted(**values: Any) -> Iterator[None]:
    """Give names of the library other values, wherever its modules know them.

    What message structs check while they decode stays as it is.
    """
    former: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == "zfabric" and not module_name.startswith("zfabric.testing"):
                namespace = vars(module)
                for name, value in values.items():
                    if name in namespace:
                        former.append((namespace, name, namespace[name]))
                        namespace[name] = value
        yield
    finally:
        for namespace, name, value in former:
            namespace[name] = value
