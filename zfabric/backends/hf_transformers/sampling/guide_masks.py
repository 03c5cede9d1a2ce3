"""What the guides of a batch allow, as one mask of bits that goes to the device in one copy."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.request.structured_outputs import Guide
from zfabric.backends.hf_transformers.sampling.device_tensors import tensor_on

_EVERYTHING: Final = -1
_OFF: Final = float("-inf")
#: Guides whose masks are computed by several threads. A mask of a JSON schema over 49,152 tokens takes some 12 µs, and to hand
#: work over takes as long as a few of these.
_TOGETHER_MIN: Final = 8
#: llguidance takes four fifths of the processors, which of fewer is one or two threads beside this one, which waits.
_PROCESSORS_MIN: Final = 4


class GuideMasks:
    """The masks of the guided rows of a batch.

    Args:
        guides: Of one vocabulary.
        places: Which rows of the logits are guided.
        rows: How many rows there are.
        device: Of the logits.
    """

    def __init__(self, guides: Sequence[Guide], places: Sequence[int], rows: int, device: torch.device) -> None:
        self._guides, self._device = guides, device
        self._places = None if len(places) == rows else tensor_on(device, places)
        shape = (len(guides), guides[0].words)
        # Written anew for each step. The copy of the last one is over then: its tokens have been read, to move the guides.
        self._mask = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")

    def apply(self, scores: torch.Tensor) -> None:
        """Put all tokens that may not come next at minus infinity, in place. Guides that wait have no say.

        Args:
            scores: (rows, vocabulary).
        """
        if not self._fill():
            return
        mask = self._mask.to(self._device, non_blocking=True).view(torch.uint8)
        added = (
            _addends(self._device)
            .index_select(0, mask.flatten().int())
            .view(len(self._guides), -1)[:, : scores.shape[1]]
        )
        if self._places is None:
            scores.add_(added)
        else:
            scores.index_add_(0, self._places, added)

    def _fill(self) -> bool:
        """Whether any has a say."""
        asked = []
        for place, guide in enumerate(self._guides):
            if guide.waits:
                self._mask[place].fill_(_EVERYTHING)
            else:
                asked.append((guide.matcher, place))
        size = self._mask.shape[1] * self._mask.element_size()
        begin = self._mask.data_ptr()
        threads = _threads() if len(asked) >= _TOGETHER_MIN else None
        if threads is not None:
            threads.unsafe_compute_mask_ptr(asked, begin, size, len(self._guides))
        else:
            for matcher, place in asked:
                matcher.unsafe_compute_mask_ptr(begin + place * size, size)
        for guide in self._guides:
            guide.note_failure()
        return bool(asked)


@functools.cache
def _threads() -> Any | None:
    """Threads of llguidance, which all models of a process share; None on a host that has too few processors for more than one.

    They are begun when so many masks are wanted at once for the first time.
    """
    if (os.cpu_count() or 1) < _PROCESSORS_MIN:
        return None
    import llguidance

    return llguidance.LLExecutor()


@functools.cache
def _addends(device: torch.device) -> torch.Tensor:
    """What is added to the logits of eight tokens, float32 (256, 8), by the byte that allows some of them.

    To add this takes a CPU a sixth of the time that it takes to fill where a mask of bools says so.
    """
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)
    return torch.zeros((256, 8), device=device).masked_fill_((bits & 1) == 0, _OFF)
