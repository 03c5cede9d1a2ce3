"""Rotary positions whose frequencies depend on how long a text is: "dynamic" and "longrope".

Transformers chooses one set of frequencies for a whole pass, by its largest position. So a long neighbour would change a
short row, and the first part of a long prompt would be computed as if it were short. Here each column has the frequencies
that it has in `generate`, where its text is alone and its prompt is computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zfabric.errors import ConfigurationError

_DYNAMIC: Final = "dynamic"
_LONG: Final = "longrope"
#: Models that compute a text anew, with the other frequencies, when it grows beyond the length that those begin at.
_ANEW: Final = frozenset({"phi3", "phimoe", "phi4_multimodal"})
#: What the module's own code takes for frequencies that never change.
_FIXED: Final = "default"


class Ropes:
    """The rotary modules of one model. `columns` belongs to the thread that runs the model.

    Args:
        model: Of transformers.

    Attributes:
        switch: A text that grows to this length is computed anew; None if none ever is.

    Raises:
        ConfigurationError: Such positions differ by kind of layer, which is not served.
    """

    def __init__(self, model: Any) -> None:
        self._rotaries: list[_Rotary] = []
        for name, module in model.named_modules():
            kind = getattr(module, "rope_type", None)
            if isinstance(kind, dict) and {_DYNAMIC, _LONG} & set(kind.values()):
                raise ConfigurationError(f"{name!r} has frequencies by length and kind of layer, which are not served")
            if kind in (_DYNAMIC, _LONG):
                self._rotaries.append(_Rotary(module, kind))
        config = getattr(model, "config", None)
        anew = bool(self._rotaries) and getattr(config, "model_type", "") in _ANEW
        anew = anew and hasattr(config, "original_max_position_embeddings")
        self.switch = self._rotaries[0].threshold + 1 if anew else None

    def __bool__(self) -> bool:
        return bool(self._rotaries)

    @contextmanager
    def columns(self, lengths: torch.Tensor) -> Iterator[None]:
        """For one pass.

        Args:
            lengths: Of the text that each column's frequencies are for, (rows, columns), on the host.
        """
        for rotary in self._rotaries:
            rotary.lengths = lengths
        try:
            yield
        finally:
            for rotary in self._rotaries:
                rotary.lengths = None

    def lengths(
        self, columns: int, lengths: Sequence[int], prompts: Sequence[int], wholes: Sequence[int] | None
    ) -> torch.Tensor:
        """Those of the newest columns of left-padded rows, for `columns`.

        Args:
            columns: How many are appended.
            lengths: Of each row afterwards.
            prompts: Tokens of each row's prompt.
            wholes: Tokens of each row when all that is to be computed before its next draw is.
        """
        after = torch.tensor(lengths).unsqueeze(1)
        if self.switch is not None:
            # Whatever its columns had before, it was computed anew when it grew too long for them.
            return (after if wholes is None else torch.tensor(wholes).unsqueeze(1)).expand(-1, columns)
        places = after - columns + torch.arange(columns).unsqueeze(0)
        return torch.maximum(places + 1, torch.tensor(prompts).unsqueeze(1))


class _Rotary:
    """One rotary module, whose `forward` is replaced."""

    def __init__(self, module: Any, kind: str) -> None:
        self._module = module
        self._kind = kind
        self._forward: Callable[..., Any] = module.forward
        self._config = module.config
        settings = module.config.rope_parameters
        own = settings.get("original_max_position_embeddings") if kind == _LONG else None
        #: The longest text with the first frequencies.
        self.threshold = int(own or module.original_max_seq_len)
        self._short = module.inv_freq
        self._scaling = module.attention_scaling
        self._long: Any = None
        self.lengths: torch.Tensor | None = None
        module.rope_type = _FIXED
        module.forward = self

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, **others: Any) -> tuple[torch.Tensor, ...]:
        lengths = self.lengths
        if lengths is None:
            lengths = torch.tensor([[int(position_ids.max()) + 1]])
        if self._kind == _LONG:
            lengths = torch.where(lengths > self.threshold, self.threshold + 1, self.threshold)
        else:
            lengths = lengths.clamp(min=self.threshold)
        groups = lengths.unique().tolist()
        if len(groups) == 1:
            return self._rotate(groups[0], x, position_ids, others)
        made: tuple[torch.Tensor, ...] | None = None
        for length in groups:
            part = self._rotate(length, x, position_ids, others)
            mask = (lengths == length).unsqueeze(2).to(x.device)
            made = part if made is None else tuple(torch.where(mask, p, m) for p, m in zip(part, made, strict=True))
        assert made is not None
        return made

    def _rotate(
        self, length: int, x: torch.Tensor, position_ids: torch.Tensor, others: Any
    ) -> tuple[torch.Tensor, ...]:
        """What the module itself makes for texts of such a length."""
        self._module.inv_freq, self._module.attention_scaling = self._frequencies(length, x.device)
        made: tuple[torch.Tensor, ...] = self._forward(x, position_ids, **others)
        return made

    def _frequencies(self, length: int, device: Any) -> tuple[Any, float]:
        if length <= self.threshold:
            self._short = self._short.to(device)
            return self._short, self._scaling
        if self._kind == _DYNAMIC:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[_DYNAMIC](self._config, device, seq_len=length)
            return frequencies, scaling
        if self._long is None:
            self._long, _ = ROPE_INIT_FUNCTIONS[_LONG](self._config, device, seq_len=length)
        return self._long, self._scaling
