"""What libraries say when they are imported, and means nothing to whoever runs a worker.

transformers imports torchao as soon as that is installed, asked for or not: it has no switch for it. torchao then speaks of its
own use of torch, and of libraries for GPUs that a host without one cannot load.
"""

from __future__ import annotations

import logging
import sys


def hush() -> None:
    """Leave out exactly that, of all that the same loggers say. Safe to call twice."""
    logging.getLogger("torch.utils._pytree").addFilter(_of_use)
    logging.getLogger("torchao").addFilter(_of_gpus)


def _of_use(record: logging.LogRecord) -> bool:
    """False for what torch tells torchao to do otherwise some day."""
    its = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not (getattr(its, "__module__", "").startswith("torchao.") and "is an Enum subclass" in str(record.msg))


def _of_gpus(record: logging.LogRecord) -> bool:
    """False for a library that cannot be loaded, where there is no GPU that it is for."""
    if not record.getMessage().startswith("Failed to load "):
        return True
    torch = sys.modules.get("torch")
    return torch is None or bool(torch.cuda.is_available())
