"""The process that vLLM is imported into, and its command line."""

from __future__ import annotations

import os
from typing import Any, Final

#: Set unless the operator has set them, before vLLM is imported, which reads them then.
_ENVIRONMENT: Final = {
    # Standard output belongs to the worker's line that says it is ready.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # An address that the operator allows must not lead to another that he does not.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # A worker reports to its controller and to nobody else.
    "VLLM_NO_USAGE_STATS": "1",
    # A process with an event loop, sockets and threads must not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def prepare_environment() -> None:
    """Call before vLLM is imported for the first time."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def version() -> str:
    """vLLM's own version; builds for other devices have distributions of other names."""
    import vllm

    return str(vllm.__version__)


def argument_parser(**options: Any) -> Any:
    """vLLM's parser, which reads nested configurations such as ``--compilation-config.level 3``."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(**options)
