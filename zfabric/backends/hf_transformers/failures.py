"""What an exception of torch means to a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zfabric.errors import BackendError, ConfigurationError, FabricError, OutOfMemoryError, RequestError


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


def nothing_left() -> RequestError:
    """The error of a request that bans all tokens that might come next."""
    return RequestError(
        "no token may come next: all are banned by logit_bias, bad_words, min_new_tokens and the guide together"
    )


def give_memory_back() -> None:
    """Have torch return what it keeps for later to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Whatever a model that is not made for this raises, is why it is refused."""
    try:
        yield
    except FabricError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigurationError(f"{name!r} cannot be run in a batch: {reason}", model=name) from error
