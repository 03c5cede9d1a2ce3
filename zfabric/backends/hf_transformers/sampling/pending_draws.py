"""Draws on their way from the device to the host: the one copy of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zfabric.wire.payloads import TokenLogprobs

#: A token, with its entry if one is wanted.
Drawn = tuple[int, TokenLogprobs | None]


class PendingDraws:
    """Begins to copy what was drawn when it is made; whoever wants it on the host waits for that copy alone.

    Args:
        tokens: What was drawn, int64 (rows,); some token of the vocabulary where nothing could be.
        packed: All that the host is told, in one tensor.
        unpack: Makes the draws of its numbers.

    Attributes:
        tokens: As given, on the device of the logits: the next pass can begin with them.
    """

    __slots__ = ("_copied", "_host", "_unpack", "tokens")

    def __init__(self, tokens: torch.Tensor, packed: torch.Tensor, unpack: Callable[[list[Any]], list[Drawn]]) -> None:
        self.tokens = tokens
        self._host = packed
        self._unpack = unpack
        self._copied: torch.cuda.Event | None = None
        if packed.is_cuda:
            # A copy that is not waited for needs memory that stays where it is.
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(packed.device))

    def result(self) -> list[Drawn]:
        """The draws, in the order of the rows; waits until they have come."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._unpack(self._host.tolist())
