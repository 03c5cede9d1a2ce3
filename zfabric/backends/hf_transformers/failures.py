"""What an exception of torch means to a request."""

from __future__ import annotations

import torch

from zfabric.errors import BackendError, FabricError, OutOfMemoryError


def out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory; on a CPU that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def as_fabric_error(error: Exception) -> FabricError:
    """The error that the caller gets. Memory that torch keeps for later is given back if it was short of it."""
    first_line = str(error).partition("\n")[0]
    if isinstance(error, FabricError):
        return error
    if out_of_memory(error):
        give_memory_back()
        return OutOfMemoryError(f"out of device memory: {first_line}")
    return BackendError(f"{type(error).__name__}: {first_line}")


def give_memory_back() -> None:
    """Have torch return what it keeps for later to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
