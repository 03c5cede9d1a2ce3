"""Texts to vectors: pooled hidden states, independent of what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.embed_inputs import EmbedInputs, Piece, owners
from zfabric.backends.hf_transformers.kv_cache import KVCache
from zfabric.backends.hf_transformers.lora import Adapter, Lora
from zfabric.backends.hf_transformers.pooling import Pooler
from zfabric.backends.hf_transformers.rope import Ropes
from zfabric.errors import ParameterRangeError
from zfabric.wire.tasks import EmbedRequest, EmbedResult


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
    ) -> torch.Tensor:
        """Hidden states of some columns, (rows, columns, size).

        Args:
            ids: Of all columns, padded on the right.
            lengths: Columns in use of each row.
            cache: Of the columns before; None if these are all.
        """
        mask = (torch.arange(end, device=ids.device).unsqueeze(0) < lengths.unsqueeze(1)).long()
        given = {} if cache is None else {"past_key_values": cache, "use_cache": True}
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
    def device(self) -> Any:
        """Of the model."""
        return self._model.device

    @property
    def pad_token(self) -> int:
        """What shorter rows are filled with."""
        return self._pad_token

    def pool(
        self, hidden: torch.Tensor, lengths: torch.Tensor, prompts: torch.Tensor, pooling: Sequence[str]
    ) -> torch.Tensor:
        """float32 (rows, dimensions), on the host."""
        return self._pooler(hidden, lengths, prompts, pooling).cpu()


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
        self._done = 0
        self._cache: Any = None
        self._parts: list[torch.Tensor] = []
        #: Tokens that the newest part took, padding included.
        self.spent = 0

    def advance(self, tokens_max: int) -> torch.Tensor | None:
        """Compute so many tokens, or all if they cannot be parted. The vectors, once the last are computed."""
        begin, rows = self._done, self._ids.shape[0]
        end = min(self._width, begin + max(1, tokens_max // rows)) if self._embedder.divisible else self._width
        if self._cache is None and end < self._width:
            self._cache = KVCache()
        self._parts.append(self._embedder.hidden(self._ids, self._lengths, self._adapters, self._cache, begin, end))
        self._done, self.spent = end, (end - begin) * rows
        if end < self._width:
            return None
        hidden = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        return self._embedder.pool(hidden, self._lengths, self._prompts, self._pooling)
