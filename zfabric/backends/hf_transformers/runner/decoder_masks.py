"""Masks for a decoder with an encoder that leaves some out.

Alone a text has no padding, so LED makes no mask for a step, and FSMT none at all once it has a cache: in a batch its rows would
look at padding, and the tokens of a part at those after them. Who computes attention by itself takes a mask that is added to the
scores, so where it is told none and one is needed it is told that of the pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch

#: How attention to a decoder's own tokens is called, and its mask.
_OWN: Final = "self_attn"
_MASKS: Final = ("attention_mask", "attn_mask")


class DecoderMasks:
    """Attention of a model's decoder to its own tokens; false if it is not its own code that computes it. `rows` belongs to the
    thread that runs the model.

    Args:
        model: Of transformers, with an encoder.
    """

    def __init__(self, model: Any) -> None:
        self._modules: list[tuple[Any, str]] = []
        if model.config._attn_implementation != "eager":
            return
        for name, module in model.get_decoder().named_modules():
            mask = _mask_of(module) if name.endswith(_OWN) else None
            if mask is not None:
                self._modules.append((module, mask))

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def rows(self, firsts: torch.Tensor, columns: int, width: int, dtype: torch.dtype) -> Iterator[None]:
        """For one pass.

        Args:
            firsts: The first column in use of each row, (rows, 1).
            columns: The newest ones, which are computed.
            width: All of them.
            dtype: That of scores.
        """
        places = torch.arange(width, device=firsts.device)
        seen = (places <= places[width - columns :].unsqueeze(1)) & (places >= firsts).unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=firsts.device)
        mask = mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
        hooks = [
            module.register_forward_pre_hook(partial(_told, name, mask), with_kwargs=True)
            for module, name in self._modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _told(
    name: str, mask: torch.Tensor, _: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return None if given.get(name) is not None else (args, {**given, name: mask})


def _mask_of(module: Any) -> str | None:
    """What such a module calls its mask."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in _MASKS if name in accepted), None)
