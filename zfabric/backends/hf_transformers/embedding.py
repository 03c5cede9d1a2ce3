"""Texts to vectors: pooled hidden states, independent of what else is in the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.prompts import prompt_tokens
from zfabric.errors import ContextOverflowError, ParameterRangeError
from zfabric.wire.payloads import EmbedRequest, EmbedResult

#: Texts of one forward pass: enough to fill a device, few enough that the longest does not make all others wait.
_ROWS_MAX: Final = 64


def own_pooling(directory: Path) -> str:
    """What a sentence-transformers checkpoint says of itself, else the mean."""
    path = directory / "1_Pooling" / "config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
        if settings.get("pooling_mode_cls_token"):
            return "cls"
        if settings.get("pooling_mode_lasttoken"):
            return "last"
    return "mean"


class Embedder:
    """Makes vectors with a model of transformers.

    Args:
        model: Gives hidden states; in evaluation mode.
        tokenizer: Its own.
        context_length: Tokens of one text.
        pooling: The model's own.
        dimensions: Length of a vector.
    """

    def __init__(self, model: Any, tokenizer: Any, *, context_length: int, pooling: str, dimensions: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._pooling = pooling
        self._dimensions = dimensions

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors in the order of the inputs; runs on the engine's thread.

        Raises:
            ContextOverflowError: An input is too long, and may be neither cut nor chunked.
            ParameterRangeError: More dimensions than there are.
        """
        dimensions = request.dimensions or self._dimensions
        if not 1 <= dimensions <= self._dimensions:
            raise ParameterRangeError(
                f"dimensions is {dimensions}, it must be 1 … {self._dimensions}", parameter="dimensions"
            )
        pieces: list[list[int]] = []
        owners: list[int] = []
        for index, text in enumerate(request.inputs):
            for piece in self._pieces(text, index, request.truncate):
                pieces.append(piece)
                owners.append(index)
        vectors = self._vectors(pieces, request.pooling or self._pooling)
        rows = torch.zeros((len(request.inputs), self._dimensions))
        weights = torch.tensor([float(len(piece)) for piece in pieces]).unsqueeze(1)
        rows.index_add_(0, torch.tensor(owners), vectors * weights)
        totals = torch.zeros((len(request.inputs), 1)).index_add_(0, torch.tensor(owners), weights)
        rows = (rows / totals)[:, :dimensions]
        if request.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        data = rows.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbedResult(rows=rows.shape[0], dimensions=dimensions, data=data)

    def _pieces(self, text: str | list[int], index: int, truncate: str) -> list[list[int]]:
        """The tokens of one input: whole, cut, or in pieces of the context's length."""
        ids = text if isinstance(text, list) else None
        tokens = prompt_tokens(self._tokenizer, None if ids else str(text), None, ids)
        limit = self._context_length
        if len(tokens) <= limit:
            return [tokens]
        if truncate == "error":
            raise ContextOverflowError(
                f"input {index} has {len(tokens)} tokens, context is {limit}",
                input=index,
                prompt_tokens=len(tokens),
                context_length=limit,
            )
        if truncate == "cut":
            return [tokens[:limit]]
        return [tokens[begin : begin + limit] for begin in range(0, len(tokens), limit)]

    def _vectors(self, pieces: list[list[int]], pooling: str) -> torch.Tensor:
        """float32 (pieces, dimensions). Pieces of like length share a forward pass, so little is padded."""
        order = sorted(range(len(pieces)), key=lambda index: len(pieces[index]))
        result = torch.empty((len(pieces), self._dimensions))
        for begin in range(0, len(order), _ROWS_MAX):
            chosen = order[begin : begin + _ROWS_MAX]
            result[chosen] = self._pool([pieces[index] for index in chosen], pooling)
        return result

    def _pool(self, pieces: list[list[int]], pooling: str) -> torch.Tensor:
        width = max(len(piece) for piece in pieces)
        pad = self._tokenizer.pad_token_id or 0
        device = self._model.device
        ids = torch.tensor([piece + [pad] * (width - len(piece)) for piece in pieces], device=device)
        lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        mask = (torch.arange(width, device=device).unsqueeze(0) < lengths.unsqueeze(1)).long()
        output = self._model(input_ids=ids, attention_mask=mask)
        return _POOLINGS[pooling](output.last_hidden_state.float(), mask, lengths).cpu()


def _mean(hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return (hidden * mask.unsqueeze(2)).sum(dim=1) / lengths.unsqueeze(1)


def _cls(hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0]


def _last(hidden: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


_POOLINGS: Final[dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "mean": _mean,
    "cls": _cls,
    "last": _last,
}
