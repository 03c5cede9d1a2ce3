"""Lists cut to what one message may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from zfabric.limits import FRAME_BYTES_GOAL, LIST_LENGTH_MAX

T = TypeVar("T")

#: Upper bounds of what one line of GRANT and of ABORT takes.
LINE_BYTES: Final = 32
ATTEMPT_BYTES: Final = 16


def batches(items: Sequence[T], size_of: Callable[[T], int], goal: int = FRAME_BYTES_GOAL) -> Iterator[list[T]]:
    """Items in order, in lists no longer than a list may be, whose sizes add up to no more than `goal` bytes unless one
    alone is larger."""
    batch: list[T] = []
    filled = 0
    for item in items:
        size = size_of(item)
        if batch and (filled + size > goal or len(batch) >= LIST_LENGTH_MAX):
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size
    if batch:
        yield batch
