"""Whether what is computed can be recorded as a graph: nothing in it may ask for a value, or bring one from the host.

A device that records refuses such an operation too, but says little of which it was, and the recording is lost; here it is named
before anything is recorded. Without such a device it is found all the same: on "meta", where only shapes are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Their result, or its size, is known once the device is there.
_ASKING: Final = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "item"}
)
#: Puts values of Python into a tensor.
_FROM_PYTHON: Final = "lift_fresh"
_MASKS: Final = (torch.bool, torch.uint8)


class CaptureCheck(TorchDispatchMode):
    """Refuses what cannot be recorded.

    Args:
        device: That it is computed on.

    Raises:
        NotImplementedError: In the call that is refused; names the operation.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _ASKING:
            raise NotImplementedError(f"{name} waits for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise NotImplementedError(f"{name} waits for the device")
        if name.startswith("index") and any(one.dtype in _MASKS for one in _tensors(args[1:2])):
            raise NotImplementedError(f"{name} with a mask waits for the device")
        found = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs or {})), _tensors(found)
        if name == _FROM_PYTHON and any(one.dim() for one in given):
            raise NotImplementedError("values of the host become a tensor")
        # A single number is told to a kernel with its other arguments, as one of Python is.
        others = [one for one in (*given, *made) if one.device.type != self._type]
        if any(one.dim() or "copy" in name for one in others):
            raise NotImplementedError(f"{name} has a tensor on {others[0].device.type}")
        return found


def checked(run: Callable[[], None], device: torch.device) -> None:
    """Compute it once. Raises: NotImplementedError: It cannot be recorded."""
    with CaptureCheck(device):
        run()


def _tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]
