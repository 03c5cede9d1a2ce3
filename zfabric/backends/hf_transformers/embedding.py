"""Texts to vectors: pooled hidden states, independent of what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from zfabric.backends.front.embed_inputs import EmbedInputs, Piece, owners
from zfabric.backends.hf_transformers.lora import Adapter, Adapters, Lora
from zfabric.backends.hf_transformers.pooling import Pooler
from zfabric.backends.hf_transformers.rope import Ropes
from zfabric.errors import ParameterRangeError
from zfabric.wire.payloads import EmbedRequest, EmbedResult


class Pieces:
    """One request, tokenized.

    Attributes:
        pieces: An input that is too long has several, if that was asked for.
        pooling: How hidden states become vectors.
        adapter: What is added to the model's weights for it.
    """

    __slots__ = ("adapter", "dimensions", "pieces", "pooling", "request")

    def __init__(
        self, request: EmbedRequest, pieces: list[Piece], dimensions: int, pooling: tuple[str, ...], adapter: Adapter | None
    ) -> None:  # fmt: skip
        self.adapter = adapter
        self.request = request
        self.dimensions = dimensions
        self.pooling = pooling
        self.pieces = pieces

    def result(self, vectors: torch.Tensor) -> EmbedResult:
        """One vector per input, of those of the pieces, float32 (pieces, size)."""
        request = self.request
        places = torch.tensor(owners(self.pieces))
        weights = torch.tensor([float(len(piece.tokens)) for piece in self.pieces]).unsqueeze(1)
        rows = torch.zeros((len(request.inputs), vectors.shape[1])).index_add_(0, places, vectors * weights)
        totals = torch.zeros((len(request.inputs), 1)).index_add_(0, places, weights)
        rows = (rows / totals)[:, : self.dimensions]
        if request.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        data = rows.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbedResult(rows=rows.shape[0], dimensions=self.dimensions, data=data)


class Embedder:
    """Makes vectors with a model of transformers.

    Args:
        model: Gives hidden states; in evaluation mode.
        inputs: Makes pieces of requests.
        pad_token: What shorter rows are filled with.
        pooler: Makes a vector of hidden states.
        lora: Adapters of the model.
        adapters: Those that requests can name.
        ropes: Positions of the model whose frequencies depend on a text's length.
    """

    def __init__(
        self, model: Any, inputs: EmbedInputs, *, pad_token: int, pooler: Pooler, lora: Lora, adapters: Adapters,
        ropes: Ropes | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._inputs = inputs
        self._pad_token = pad_token
        self._pooler = pooler
        self._lora = lora
        self._ropes = ropes
        self._adapters = adapters

    def pieces(self, request: EmbedRequest) -> Pieces:
        """Tokenize. On any thread.

        Raises:
            ParameterRangeError: More dimensions than there are; or see `Pooler.chosen`.
            FabricError: See `EmbedInputs.pieces`.
        """
        pooling = self._pooler.chosen(request.pooling)
        size = self._pooler.size(pooling)
        dimensions = size if request.dimensions is None else request.dimensions
        if not 1 <= dimensions <= size:
            raise ParameterRangeError(
                f"dimensions is {dimensions}, it must be 1 … {size}", parameter="dimensions", value=str(dimensions)
            )
        adapter = self._adapters.find(request.model)
        return Pieces(request, self._inputs.pieces(request), dimensions, pooling, adapter)

    def vectors(
        self, pieces: Sequence[Piece], pooling: Sequence[str], adapters: Sequence[Adapter | None] = ()
    ) -> torch.Tensor:
        """float32 (pieces, dimensions), on the host, in one forward pass."""
        width = max(len(piece.tokens) for piece in pieces)
        device = self._model.device
        rows = [[*piece.tokens, *[self._pad_token] * (width - len(piece.tokens))] for piece in pieces]
        ids = torch.tensor(rows, device=device)
        lengths = torch.tensor([len(piece.tokens) for piece in pieces], device=device)
        prompts = torch.tensor([piece.prompt for piece in pieces], device=device)
        mask = (torch.arange(width, device=device).unsqueeze(0) < lengths.unsqueeze(1)).long()
        turning = (
            nullcontext() if self._ropes is None else self._ropes.columns(lengths.cpu().unsqueeze(1).expand(-1, width))
        )
        with self._lora.rows(adapters), turning:
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return self._pooler(hidden, lengths, prompts, pooling).cpu()
