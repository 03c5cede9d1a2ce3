"""Texts to vectors: pooled hidden states, independent of what else is in the batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.embed_inputs import EmbedInputs, Piece, owners
from zfabric.backends.hf_transformers.cache.kv_cache import KVCache
from zfabric.backends.hf_transformers.parameters.lora import Adapter, Lora
from zfabric.backends.hf_transformers.pooling.poolers import TOKENS, Pooler
from zfabric.backends.hf_transformers.runner.rope import Ropes
from zfabric.errors import ParameterRangeError
from zfabric.wire.tasks import EmbedRequest, EmbedResult, EmbedTokensRequest, EmbedTokensResult


class Pieces(ABC):
    """One request, tokenized.

    Args:
        pieces: An input that is too long has several, if that was asked for.
        pooling: How hidden states become vectors.
        adapter: What is added to the model's weights for it.
    """

    __slots__ = ("adapter", "pieces", "pooling")

    def __init__(self, pieces: list[Piece], pooling: tuple[str, ...], adapter: Adapter | None) -> None:
        self.pieces = pieces
        self.pooling = pooling
        self.adapter = adapter

    @abstractmethod
    def result(self, rows: Sequence[torch.Tensor]) -> Any:
        """The request's result, of what was made of each piece, float32."""


class EmbedPieces(Pieces):
    """One request for vectors, tokenized."""

    __slots__ = ("dimensions", "request")

    def __init__(
        self, request: EmbedRequest, pieces: list[Piece], dimensions: int, pooling: tuple[str, ...], adapter: Adapter | None
    ) -> None:  # fmt: skip
        super().__init__(pieces, pooling, adapter)
        self.request = request
        self.dimensions = dimensions

    def result(self, rows: Sequence[torch.Tensor]) -> EmbedResult:
        """One vector per input, of those of the pieces, float32 (size)."""
        request, vectors = self.request, torch.stack(list(rows))
        places = torch.tensor(owners(self.pieces))
        weights = torch.tensor([float(len(piece.tokens)) for piece in self.pieces]).unsqueeze(1)
        sums = torch.zeros((len(request.inputs), vectors.shape[1])).index_add_(0, places, vectors * weights)
        totals = torch.zeros((len(request.inputs), 1)).index_add_(0, places, weights)
        matrix = (sums / totals)[:, : self.dimensions]
        if request.normalize:
            matrix = torch.nn.functional.normalize(matrix, dim=1)
        data = matrix.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbedResult(rows=matrix.shape[0], dimensions=self.dimensions, data=data)


class TokenPieces(Pieces):
    """One request for vectors of tokens, tokenized."""

    __slots__ = ("_dimensions", "_normalize")

    def __init__(
        self, request: EmbedTokensRequest, pieces: list[Piece], dimensions: int, adapter: Adapter | None
    ) -> None:
        super().__init__(pieces, TOKENS, adapter)
        self._dimensions = dimensions
        self._normalize = request.normalize

    def result(self, rows: Sequence[torch.Tensor]) -> EmbedTokensResult:
        """All vectors of each input, of hidden states of each, float32 (tokens, size)."""
        matrix = torch.cat(list(rows))[:, : self._dimensions]
        if self._normalize:
            matrix = torch.nn.functional.normalize(matrix, dim=1)
        data = matrix.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbedTokensResult([len(row) for row in rows], self._dimensions, data)


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
        divisible: No token sees a later one, so that a text can be computed in parts.
    """

    def __init__(
        self, model: Any, inputs: EmbedInputs, *, pad_token: int, pooler: Pooler, lora: Lora, adapters: Adapters[Adapter],
        ropes: Ropes | None = None, divisible: bool = False,
    ) -> None:  # fmt: skip
        self._model = model
        self._inputs = inputs
        self._pad_token = pad_token
        self._pooler = pooler
        self._lora = lora
        self._ropes = ropes
        self._adapters = adapters
        self._divisible = divisible

    def pieces(self, request: EmbedRequest) -> EmbedPieces:
        """Tokenize. On any thread.

        Raises:
            ParameterRangeError: More dimensions than there are; or see `Pooler.chosen`.
            FabricError: See `EmbedInputs.pieces`.
        """
        pooling = self._pooler.chosen(request.pooling)
        dimensions = _dimensions(request.dimensions, self._pooler.size(pooling))
        adapter = self._adapters.find(request.model)
        return EmbedPieces(request, self._inputs.pieces(request), dimensions, pooling, adapter)

    def token_pieces(self, request: EmbedTokensRequest) -> TokenPieces:
        """Tokenize. On any thread. Raises: as `pieces`."""
        dimensions = _dimensions(request.dimensions, self._pooler.hidden_size)
        adapter = self._adapters.find(request.model)
        return TokenPieces(request, self._inputs.pieces(request), dimensions, adapter)

    def begin(
        self, pieces: Sequence[Piece], pooling: Sequence[str], adapters: Sequence[Adapter | None] = ()
    ) -> EmbedPass:
        """Compute these together; nothing is, until the pass is told to advance."""
        return EmbedPass(self, pieces, pooling, adapters)

    def hidden(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        adapters: Sequence[Adapter | None],
        cache: Any,
        begin: int,
        end: int,
        types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of some columns, (rows, columns, size).

        Args:
            ids: Of all columns, padded on the right.
            lengths: Columns in use of each row.
            cache: Of the columns before; None if these are all.
            types: Of all columns, where the model tells two texts apart by them.
        """
        mask = (torch.arange(end, device=ids.device).unsqueeze(0) < lengths.unsqueeze(1)).long()
        given = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        if types is not None:
            given["token_type_ids"] = types[:, begin:end]
        turning: AbstractContextManager[None] = nullcontext()
        if self._ropes is not None:
            turning = self._ropes.columns(lengths.cpu().unsqueeze(1).expand(-1, end - begin))
        with self._lora.rows(adapters), turning:
            made = self._model(input_ids=ids[:, begin:end], attention_mask=mask, **given)
        return made.last_hidden_state

    @property
    def divisible(self) -> bool:
        """Whether a text can be computed in parts: none of its tokens sees a later one."""
        return self._divisible

    @property
    def modes(self) -> tuple[str, ...]:
        """How hidden states become vectors, unless a request says something else."""
        return self._pooler.modes

    @property
    def device(self) -> Any:
        """Of the model, which need not tell."""
        return next(self._model.parameters()).device

    @property
    def pad_token(self) -> int:
        """What shorter rows are filled with."""
        return self._pad_token

    def pool(
        self, hidden: torch.Tensor, lengths: torch.Tensor, prompts: torch.Tensor, pooling: Sequence[str]
    ) -> list[torch.Tensor]:
        """What the pooler makes of each row, on the host."""
        return [row.cpu() for row in self._pooler(hidden, lengths, prompts, pooling)]


class EmbedPass:
    """Pieces in one batch, computed at once or, if the model allows, some columns at a time."""

    def __init__(
        self, embedder: Embedder, pieces: Sequence[Piece], pooling: Sequence[str], adapters: Sequence[Adapter | None]
    ) -> None:
        self._embedder, self._pooling, self._adapters = embedder, pooling, adapters
        device = embedder.device
        self._width = max(len(piece.tokens) for piece in pieces)
        rows = [[*piece.tokens, *[embedder.pad_token] * (self._width - len(piece.tokens))] for piece in pieces]
        self._ids = torch.tensor(rows, device=device)
        self._lengths = torch.tensor([len(piece.tokens) for piece in pieces], device=device)
        self._prompts = torch.tensor([piece.prompt for piece in pieces], device=device)
        self._types = _types(pieces, self._width, device)
        self._done = 0
        self._cache: Any = None
        self._parts: list[torch.Tensor] = []
        #: Tokens that the newest part took, padding included.
        self.spent = 0

    def advance(self, tokens_max: int) -> list[torch.Tensor] | None:
        """Compute so many tokens, or all if they cannot be parted. What each row gives, once the last are computed."""
        begin, rows = self._done, self._ids.shape[0]
        end = min(self._width, begin + max(1, tokens_max // rows)) if self._embedder.divisible else self._width
        if self._cache is None and end < self._width:
            self._cache = KVCache()
        made = self._embedder.hidden(self._ids, self._lengths, self._adapters, self._cache, begin, end, self._types)
        self._parts.append(made)
        self._done, self.spent = end, (end - begin) * rows
        if end < self._width:
            return None
        hidden = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        return self._embedder.pool(hidden, self._lengths, self._prompts, self._pooling)


def _dimensions(wanted: int | None, size: int) -> int:
    """Raises: ParameterRangeError: Vectors are shorter than that."""
    dimensions = size if wanted is None else wanted
    if not 1 <= dimensions <= size:
        raise ParameterRangeError(
            f"dimensions is {dimensions}, it must be 1 … {size}", parameter="dimensions", value=str(dimensions)
        )
    return dimensions


def _types(pieces: Sequence[Piece], width: int, device: Any) -> torch.Tensor | None:
    """Which of two texts each token is of, padded on the right; None for a model that does not tell them apart."""
    rows = [piece.types for piece in pieces if piece.types is not None]
    if len(rows) != len(pieces):
        return None
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
