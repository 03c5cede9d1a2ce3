"""The forward pass: what a batch asks of a model, in the words that the model's class takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from zfabric.backends.hf_transformers.cache import GrowingCache, PairedCache
from zfabric.backends.hf_transformers.lora import Adapter, Lora
from zfabric.backends.hf_transformers.sequence import Answer

#: Media that have one entry per token of the prompt.
_PER_TOKEN = "token_type_ids"


class Model:
    """The forward pass of a decoder.

    Args:
        model: Of transformers, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = model.device
        self.lora = Lora(model)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        embeddings = model.get_output_embeddings() or model.get_input_embeddings()
        self.vocabulary_size = int(embeddings.weight.shape[0])

    def start(self, answers: Sequence[Answer]) -> Any:
        """An empty cache for one row of each."""
        return GrowingCache()

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        cache: Any,
        *,
        adapters: Sequence[Adapter | None] = (),
        media: dict[str, Any] | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Append columns to a left-padded cache.

        Args:
            rows: Tokens to append, as many in each row; the first ones may be padding.
            lengths: Columns in use of each row afterwards; those to the left of them are padding.
            adapters: Of each row; empty for none at all.
            media: Images and the like of the one row, whose placeholders are all in this part.

        Returns:
            Float32 logits of the last column, (rows, vocabulary), or of all, (rows, columns, vocabulary).
        """
        columns = len(rows[0])
        width = cache.get_seq_length() + columns
        mask, first = self._mask(lengths, width)
        arguments = self._arguments(rows, mask, cache) | self._sent(media or {}, columns)
        if "position_ids" in self._accepted:
            places = torch.arange(width - columns, width, device=self.device).expand(len(rows), -1)
            arguments["position_ids"] = places if first is None else (places - first).clamp_(min=0)
        if "logits_to_keep" in self._accepted and not all_logits:
            arguments["logits_to_keep"] = 1
        with self.lora.rows(adapters):
            logits = self._model(**arguments).logits
        logits = (logits if all_logits else logits[:, -1]).float()
        # Drawing needs float64, which MPS does not have.
        return logits.cpu() if logits.device.type == "mps" else logits

    def warm_up(self) -> None:
        """A prompt and a step, so that what is made at first use is there before the first request."""
        with torch.inference_mode():
            cache = self._warm_cache()
            self([[0] * 8], [8], cache)
            self([[0]], [9], cache)

    def _warm_cache(self) -> Any:
        return GrowingCache()

    def _arguments(self, rows: Sequence[Sequence[int]], mask: torch.Tensor | None, cache: Any) -> dict[str, Any]:
        arguments = {"input_ids": self._send(rows), "past_key_values": cache, "use_cache": True}
        # Without padding there is no mask, which takes the quicker attention kernels.
        return arguments if mask is None else {**arguments, "attention_mask": mask}

    def _mask(self, lengths: Sequence[int], width: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which columns are in use, and the first of each row; None if there is no padding."""
        if min(lengths) == width:
            return None, None
        first = self._send([width - length for length in lengths]).unsqueeze(1)
        return (torch.arange(width, device=self.device).unsqueeze(0) >= first).long(), first

    def _sent(self, media: dict[str, Any], columns: int) -> dict[str, Any]:
        """Media on the device, in the model's own type; what has an entry per token has one for each column."""
        sent: dict[str, Any] = {}
        for name in media.keys() & self._accepted:
            value = media[name]
            tensor = value.to(self._model.dtype) if torch.is_floating_point(value) else value
            if name.endswith(_PER_TOKEN):
                tensor = torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
            sent[name] = tensor.to(self.device)
        return sent

    def _send(self, values: Any) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.long)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


class PairedModel(Model):
    """An encoder, which reads the prompt once, and a decoder, which is stepped.

    Only for models whose positions are relative: a padded column has no place of its own.
    """

    def start(self, answers: Sequence[Answer]) -> PairedCache:
        """Have the sources of these read."""
        return self._read([answer.source for answer in answers], [answer.adapter for answer in answers])

    def _read(self, sources: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> PairedCache:
        width = max(len(source) for source in sources)
        cache = PairedCache([len(source) for source in sources])
        ids = self._send([[0] * (width - len(source)) + list(source) for source in sources])
        mask, _ = self._mask(cache.sources, width)
        with self.lora.rows(adapters):
            cache.encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return cache

    def _warm_cache(self) -> PairedCache:
        return self._read([[0] * 8], ())

    def _arguments(self, rows: Sequence[Sequence[int]], mask: torch.Tensor | None, cache: Any) -> dict[str, Any]:
        encoded = cache.encoded
        if encoded is None:
            # All layers have read it: only its shape is still asked for.
            shape = (len(cache.sources), cache.source_columns, self._model.config.d_model)
            encoded = torch.zeros(1, device=self.device, dtype=self._model.dtype).expand(shape)
        source_mask, _ = self._mask(cache.sources, cache.source_columns)
        cache.encoded = None
        return {
            "decoder_input_ids": self._send(rows),
            "decoder_attention_mask": mask,
            "attention_mask": source_mask,
            "encoder_outputs": (encoded,),
            "past_key_values": cache,
            "use_cache": True,
        }
