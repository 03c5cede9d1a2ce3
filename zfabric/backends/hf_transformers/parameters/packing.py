"""Weights of a CPU's linear layers in the order in which its matrix kernels read them.

A plain weight is brought into that order anew at each call, as soon as a batch has several rows: for a few rows that takes
longer than the product itself, so a batch would hardly be faster than its rows one by one.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Final
from weakref import WeakValueDictionary

import torch

#: Smaller ones stay in the processor's cache, where ordering them costs less than the other kernel's call.
_WEIGHTS_MIN: Final = 1 << 16
#: Layers whose weight is read past the layer itself: state-space models multiply by that of their time steps.
_READ_BY_OTHERS: Final = frozenset({"dt_proj"})
#: Layers by number: torch's compiler takes weights in such an order for constants alone, so it is not shown them.
_LAYERS: Final[WeakValueDictionary[int, PackedLinear]] = WeakValueDictionary()
_numbers: Final = count()
_packed_product = torch.ops.mkldnn._linear_pointwise.default
_LIBRARY: Final = torch.library.Library("zfabric", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor given, int layer) -> Tensor")


class PackedLinear(torch.nn.Module):
    """A linear layer for inference on a CPU.

    Args:
        plain: The layer whose place it takes; its weight is not kept.
    """

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = torch.nn.Parameter(packed(plain.weight.detach()), requires_grad=False)
        self.bias = plain.bias
        self._number = next(_numbers)
        _LAYERS[self._number] = self

    def forward(self, given: torch.Tensor) -> Any:
        """`given @ weight.T + bias`."""
        if torch.compiler.is_compiling():
            return torch.ops.zfabric.packed_linear(given, self._number)
        return product(given, self.weight, self.bias)


def _product(given: torch.Tensor, layer: int) -> torch.Tensor:
    found: torch.Tensor = _LAYERS[layer](given)
    return found


def _shape(given: torch.Tensor, layer: int) -> torch.Tensor:
    return given.new_empty((*given.shape[:-1], _LAYERS[layer].out_features))


_LIBRARY.impl("packed_linear", _product, "CompositeExplicitAutograd")
torch.library.register_fake("zfabric::packed_linear", _shape, lib=_LIBRARY)


def pack(model: torch.nn.Module) -> int:
    """Replace the large linear layers that are on the CPU. Returns how many."""
    dtypes = _dtypes()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        # Kinds derived from it, and from its weight, such as quantized ones, keep their weights in ways of their own.
        if type(child) is torch.nn.Linear
        and type(child.weight) is torch.nn.Parameter
        and name not in _READ_BY_OTHERS
        and child.weight.device.type == "cpu"
        and child.weight.dtype in dtypes
        and child.weight.numel() >= _WEIGHTS_MIN
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A plain weight in the order in which `PackedLinear` has it."""
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return ordered


def dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight in the usual order, whichever it is in."""
    return weight.to_dense() if weight.is_mkldnn else weight


def product(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`given @ weight.T + bias` with a weight that may be packed."""
    if weight.is_mkldnn:
        made: torch.Tensor = _packed_product(given, weight, bias, "none", [], "")
        return made
    return torch.nn.functional.linear(given, weight, bias)


def _dtypes() -> frozenset[torch.dtype]:
    """Types that the kernels have on this machine; none if torch was built without them."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    narrow = {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    return frozenset({torch.float32} | narrow)
