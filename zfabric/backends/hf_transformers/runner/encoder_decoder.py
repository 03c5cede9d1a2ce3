"""The forward pass of an encoder, which reads the prompt once, and of a decoder, which is stepped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutput

from zfabric.backends.hf_transformers.cache.kv_cache import EncoderDecoderKVCache
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.request.sequence import Answer
from zfabric.backends.hf_transformers.runner.decoder_masks import DecoderMasks
from zfabric.backends.hf_transformers.runner.decoder_positions import DecoderPositions, row_places
from zfabric.backends.hf_transformers.runner.model_runner import ModelRunner
from zfabric.backends.hf_transformers.runner.rope import Ropes

#: Settings of encoders that look at blocks or windows of columns. Some of them look otherwise at a text, if it stands in a batch
#: whose longest one is longer than so much.
_BLOCKS: Final = re.compile(r"window|chunk|local|sparse|block|stride")
#: How a decoder with an encoder calls the places that it is told.
_PLACES: Final = "decoder_position_ids"


class EncoderDecoderRunner(ModelRunner):
    """Steps a decoder that has an encoder; arguments as of `ModelRunner`.

    Attributes:
        apart: Sources are read one by one, since what an encoder makes of one depends on how many columns there are.
    """

    def __init__(self, model: Any, ropes: Ropes | None = None, *, compiled: bool = False) -> None:
        super().__init__(model, ropes, compiled=compiled)
        settings = model.config.get_text_config().to_dict()
        self.apart = any(value and _BLOCKS.search(name) for name, value in settings.items())
        # Those of the encoder, which counts by itself: its rows are padded on the right.
        self.takes_positions = False
        self._told = _PLACES in self._accepted
        self._counted = None if self._told else DecoderPositions(model.get_decoder()) or None
        # A translator may read a language by other tokens than it writes one.
        read, drawn = model.get_input_embeddings(), model.get_output_embeddings()
        written = getattr(model.get_decoder(), "embed_tokens", read)
        self.read_vocabulary_size = int(read.weight.shape[0])
        self.vocabulary_size = min(int(written.weight.shape[0]), int((drawn or written).weight.shape[0]))
        self._masks = DecoderMasks(model) or None
        self._said: Any = BaseModelOutput
        self._filler = int(getattr(model.config.get_text_config(), "pad_token_id", None) or 0)

    def start(self, answers: Sequence[Answer]) -> EncoderDecoderKVCache:
        """Have the sources of these read."""
        return self._read([answer.source for answer in answers], [answer.adapter for answer in answers])

    def _read(self, sources: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> EncoderDecoderKVCache:
        sizes = [len(source) for source in sources]
        cache = EncoderDecoderKVCache(sizes)
        if self.apart and len(sources) > 1:
            width = max(sizes)
            parts = []
            for index, source in enumerate(sources):
                part = self._encode([source], adapters[index : index + 1])
                parts.append(pad(part, (0, 0, width - part.shape[1], 0)))
            cache.take_in(torch.cat(parts))
        else:
            cache.take_in(self._encode(sources, adapters))
        return cache

    def _encode(self, sources: Sequence[Sequence[int]], adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """What the encoder makes of these, (rows, columns, size), padded on the left."""
        sizes = [len(source) for source in sources]
        width = max(sizes)
        ids = self.send([[*source, *[self._filler] * (width - len(source))] for source in sources])
        ends = self.send(sizes).unsqueeze(1)
        places = torch.arange(width, device=self.device).unsqueeze(0)
        # Whoever counts places from the first column, or cuts columns into blocks, finds each text where it is alone.
        mask = (places < ends).long()
        with self.lora.rows(adapters):
            made = self._model.get_encoder()(input_ids=ids, attention_mask=mask)
        # Decoders ask for what else their own encoders say.
        self._said = type(made)
        encoded: torch.Tensor = made.last_hidden_state
        if min(sizes) == width:
            return encoded
        moved = (places - (width - ends)).clamp_(min=0).unsqueeze(2)
        return encoded.gather(1, moved.expand(-1, -1, encoded.shape[2]))

    def _warm_cache(self) -> EncoderDecoderKVCache:
        return self._read([[0] * 8], ())

    @contextmanager
    def _turning(
        self, columns: int, lengths: Sequence[int], answers: Sequence[Answer], wholes: Sequence[int] | None
    ) -> Iterator[None]:
        width = max(lengths)
        # Rows of one length have no padding: columns that no row uses are cut off.
        padded = min(lengths) < width
        turning = super()._turning(columns, lengths, answers, wholes)
        if padded and self._counted is not None:
            turning = self._counted.rows(self.send(row_places(columns, lengths)), width)
        masking: AbstractContextManager[None] = nullcontext()
        if self._masks is not None and (padded or columns > 1):
            firsts = self.send([width - length for length in lengths]).unsqueeze(1)
            masking = self._masks.rows(firsts, columns, width, self._model.dtype)
        with turning, masking:
            yield

    def _arguments(self, rows: Sequence[Sequence[int]], mask: torch.Tensor | None, cache: Any) -> dict[str, Any]:
        encoded = cache.encoded
        if encoded is None:
            # All layers have read it: only its shape is still asked for.
            shape = (len(cache.sources), cache.source_columns, cache.encoded_size)
            encoded = torch.zeros(1, device=self.device, dtype=self._model.dtype).expand(shape)
        source_mask, _ = self._mask(cache.sources, cache.source_columns)
        cache.encoded = None
        arguments = {
            "decoder_input_ids": self.send(rows),
            "decoder_attention_mask": mask,
            "attention_mask": source_mask,
            "encoder_outputs": self._said(last_hidden_state=encoded),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._told:
            before = cache.get_seq_length()
            places = torch.arange(before, before + len(rows[0]), device=self.device).expand(len(rows), -1)
            if mask is not None:
                places = (places - (mask == 0).sum(dim=1, keepdim=True)).clamp_(min=0)
            arguments[_PLACES] = places
        return arguments
