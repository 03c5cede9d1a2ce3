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


def array_on(device: torch.device, numbers: Any) -> torch.Tensor:
    """A tensor of a numpy array; see `tensor_on`."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def tensors_on(device: torch.device, lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """A tensor of each of these, all in one copy; see `tensor_on`."""
    sent = tensor_on(device, [number for its in lists for number in its])
    return list(sent.split([len(its) for its in lists]))
