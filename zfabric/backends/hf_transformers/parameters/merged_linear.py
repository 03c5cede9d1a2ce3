"""Linear layers of one input as one product: queries, keys and values, or the two sides of a gated feed-forward part.

One product of more columns takes less time than several, and it is one call. Each layer stays where it was, and whoever calls it
has its part: the product is made when the first is called with an input, and the others take theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.parameters.packing import PackedLinear, dense, packed, product

#: What the product is called among the layers whose place it takes.
_NAME: Final = "merged"


class MergedLinear(torch.nn.Module):
    """The product of several linear layers.

    Args:
        names: Of the layers, which have one input, among their parent's.
        layers: Each plain or packed; their weights are not kept.

    Attributes:
        sizes: Values that each gives.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[Any]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.sizes = [int(layer.out_features) for layer in layers]
        weight = torch.cat([dense(layer.weight.detach()) for layer in layers])
        if any(isinstance(layer, PackedLinear) for layer in layers):
            weight = packed(weight)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if layers[0].bias is not None:
            self.bias = torch.nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
        self._given: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """What all of them make, one behind the other."""
        return product(given, self.weight, self.bias)

    def part(self, given: torch.Tensor, index: int) -> torch.Tensor:
        """What one of them makes; each input is multiplied once if each layer is called with it."""
        if given is not self._given or index not in self._left:
            self._given, self._left = given, dict(enumerate(self(given).split(self.sizes, dim=-1)))
        made = self._left.pop(index)
        if not self._left:
            self._given = None
        return made


class LinearPart(torch.nn.Module):
    """One of them.

    Args:
        merged: The product of all.
        index: Its place among them.
    """

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        # Not a module of this one, which has no weights of its own.
        self._whole = (merged,)
        self._index = index
        self.in_features, self.out_features = int(merged.weight.shape[1]), merged.sizes[index]

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """`given @ weight.T + bias`."""
        return self._whole[0].part(given, self._index)

    @property
    def device(self) -> torch.device:
        """Where its weight is."""
        return self._whole[0].weight.device

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), unpacked anew for each that asks; to be read, not written."""
        return self._own(dense(self._whole[0].weight))

    @property
    def bias(self) -> torch.Tensor | None:
        """(out,); to be read, not written."""
        bias = self._whole[0].bias
        return None if bias is None else self._own(bias)

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        return values.split(self._whole[0].sizes)[self._index]


def merge(parent: torch.nn.Module, names: Sequence[str]) -> MergedLinear | None:
    """Have linear layers of one input multiplied together. Returns None, and leaves them, if they are not all alike: others may
    be quantized, or watched, or lie on another device."""
    layers: list[Any] = [getattr(parent, name, None) for name in names]
    if not all(map(is_plain, layers)) or len({_kind(layer) for layer in layers}) > 1:
        return None
    merged = MergedLinear(names, layers)
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(merged, index))
    parent.add_module(_NAME, merged)
    return merged


def merged_names(model: torch.nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Each tensor of a merged layer, and the tensors of which it consists, by their names in a model that has them apart."""
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = name.removesuffix(_NAME)
            for kind in ("weight",) if module.bias is None else ("weight", "bias"):
                yield f"{name}.{kind}", [f"{parent}{one}.{kind}" for one in module.names]


def is_plain(layer: Any) -> bool:
    """Whether it is a linear layer, packed or not, that does nothing else and is not watched."""
    if type(layer) not in (torch.nn.Linear, PackedLinear) or type(layer.weight) is not torch.nn.Parameter:
        return False
    return "forward" not in vars(layer) and not layer._forward_hooks and not layer._forward_pre_hooks


def _kind(layer: Any) -> tuple[Any, ...]:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None
