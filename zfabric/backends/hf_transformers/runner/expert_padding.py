"""Experts that are told which tokens are padding, and take others for it.

NLLB-MoE's routers get the mask of attention, of which they take as many of the last columns as there are tokens: in a step these
are places of the last row, and in half of its kinds of masks a place that is seen counts as padding. What they make of padding
matters to nobody as long as each expert takes as many tokens as there are, so they are told of none.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

#: How the mask is called.
_PADDING: Final = "padding_mask"
#: The share of a pass's tokens that an expert takes; those beyond it go to none.
_CAPACITY: Final = "moe_eval_capacity_token_fraction"


def bounds_experts(config: Any) -> bool:
    """Whether experts leave out tokens of a text when others are beside it."""
    return bool(getattr(config, _CAPACITY, 1) < 1)


def forget_padding(model: Any) -> None:
    """Have all routers of a model told of no padding."""
    for module in model.modules():
        if hasattr(module, "route_tokens") and _PADDING in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(_told, with_kwargs=True)


def _told(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args[:1], {name: value for name, value in given.items() if name != _PADDING}
