"""The forward pass of an encoder that hears, and of a decoder that writes down what was said: Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.cache.kv_cache import EncoderDecoderKVCache
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.encoder_decoder import EncoderDecoderRunner

#: What the encoder is given, in `Answer.media`: of one sound, (1, bins, frames); and what it has made of it already.
FEATURES: Final = "input_features"
HEARD: Final = "heard"
#: Frames of features for one column of the encoder: its convolutions halve them.
_FRAMES: Final = 2


class SpeechRunner(EncoderDecoderRunner):
    """Steps a decoder whose encoder hears; arguments as of `ModelRunner`. A sound has as many columns as any other."""

    def start(self, answers: Sequence[Answer]) -> EncoderDecoderKVCache:
        """Have the sounds of these heard, all that are not yet in one pass."""
        media = [answer.media or {} for answer in answers]
        missing = [its[FEATURES] for its in media if its.get(HEARD) is None]
        made = iter(self.hear(torch.cat(missing)).split(1) if missing else ())
        heard = [its.get(HEARD) for its in media]
        return self._taken([next(made) if its is None else its for its in heard])

    @property
    def columns(self) -> int:
        """Those of any sound."""
        return int(self._model.config.max_source_positions)

    def hear(self, features: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of sounds, (sounds, columns, size)."""
        heard: torch.Tensor = self._model.get_encoder()(
            features.to(device=self.device, dtype=self._model.dtype)
        ).last_hidden_state
        return heard

    def likeliest(self, heard: torch.Tensor, start: int, candidates: Sequence[int]) -> int:
        """Which of some tokens comes first in an answer to a sound: `generate` finds out its language so."""
        logits = self([[start]], [1], self._taken([heard]))[0]
        among = torch.tensor(candidates, device=logits.device)
        return int(candidates[int(logits[among].argmax())])

    def silence(self) -> torch.Tensor:
        """Features of nothing."""
        return torch.zeros(1, self._model.config.num_mel_bins, self.columns * _FRAMES)

    def _taken(self, heard: Sequence[torch.Tensor]) -> EncoderDecoderKVCache:
        cache = EncoderDecoderKVCache([self.columns] * len(heard))
        cache.take_in(torch.cat(list(heard)))
        return cache

    def _warm_cache(self) -> EncoderDecoderKVCache:
        return self._taken([self.hear(self.silence())])

    def sent(self, media: Mapping[str, Any], columns: int = 0) -> dict[str, Any]:
        """The encoder alone takes them."""
        return {}
