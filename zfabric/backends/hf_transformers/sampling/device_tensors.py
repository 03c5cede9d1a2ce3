"""Tensors of a few numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tensor_on(device: torch.device, numbers: Sequence[Any], dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A tensor of these; on a CUDA device the host does not wait for the copy, nor for what was begun before."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def column_on(device: torch.device, numbers: Sequence[float]) -> torch.Tensor:
    """A float32 tensor (rows, 1) of these; see `tensor_on`."""
    return tensor_on(device, numbers, torch.float32).unsqueeze(1)
