"""Whether there are kernels for a CPU here, and what they take."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Final

import torch

#: Numbers of a vector.
LANES: Final = 16
#: With more threads torch divides the work among them, and a kernel has one.
_THREADS_MAX: Final = 2


def kernels() -> ModuleType | None:
    """`calls`, if they are to be used now.

    They are not where numba is not installed, or told to compile nothing (NUMBA_DISABLE_JIT=1).
    """
    return _calls() if torch.get_num_threads() <= _THREADS_MAX else None


def takes(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether they compute rows of so many numbers of a type that are on a device."""
    dense = all(size % LANES == 0 for size in sizes)
    return dense and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


@cache
def _calls() -> ModuleType | None:
    try:
        import numba

        from zfabric.backends.hf_transformers.cpu_kernels import calls
    except ImportError:
        return None
    return None if numba.config.DISABLE_JIT else calls
