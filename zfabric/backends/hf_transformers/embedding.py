"""Texts to vectors: pooled hidden states, independent of what else is in the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from zfabric.backends.hf_transformers.lora import Adapter, Adapters, Lora
from zfabric.backends.prompts import prompt_tokens
from zfabric.errors import ConfigurationError, ContextOverflowError, ParameterRangeError, RequestError
from zfabric.wire.payloads import EmbedRequest, EmbedResult

#: Steps of a sentence-transformers checkpoint that are done here.
_STEPS: Final = frozenset({"Transformer", "Pooling", "Normalize"})
#: Its names of poolings, former and present.
_MODES: Final = {
    "mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "last",
}  # fmt: skip


def own_pooling(directory: Path) -> str:
    """What a sentence-transformers checkpoint says of itself, else the mean.

    Raises:
        ConfigurationError: The checkpoint has steps that are not done here, so its vectors would be wrong.
    """
    for module in _json(directory / "modules.json") or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _STEPS:
            raise ConfigurationError(f"{directory} has a step {kind!r} after its model, which is not supported")
    settings = _json(directory / "1_Pooling" / "config.json") or {}
    given = settings.get("pooling_mode")
    modes = [given] if given else [name.removeprefix("pooling_mode_") for name in settings if settings[name] is True]
    modes = [mode for mode in modes if mode != "include_prompt"] or ["mean_tokens"]
    pooling = _MODES.get(modes[0]) if len(modes) == 1 else None
    if pooling is None:
        raise ConfigurationError(f"{directory} pools by {', '.join(modes)}, which is not supported")
    return pooling


def own_length(directory: Path) -> int | None:
    """Tokens that a sentence-transformers checkpoint takes, if it says so."""
    settings = _json(directory / "sentence_bert_config.json") or {}
    length = settings.get("max_seq_length")
    return int(length) if length else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Pieces:
    """One request, tokenized.

    Attributes:
        tokens: Of each piece; an input that is too long has several, if that was asked for.
        owners: The input that each belongs to.
        adapter: What is added to the model's weights for it.
    """

    __slots__ = ("adapter", "dimensions", "owners", "pooling", "request", "tokens")

    def __init__(self, request: EmbedRequest, dimensions: int, pooling: str, adapter: Adapter | None) -> None:
        self.adapter = adapter
        self.request = request
        self.dimensions = dimensions
        self.pooling = pooling
        self.tokens: list[list[int]] = []
        self.owners: list[int] = []

    def result(self, vectors: torch.Tensor) -> EmbedResult:
        """One vector per input, of those of the pieces, float32 (pieces, size)."""
        request = self.request
        owners = torch.tensor(self.owners)
        weights = torch.tensor([float(len(piece)) for piece in self.tokens]).unsqueeze(1)
        rows = torch.zeros((len(request.inputs), vectors.shape[1])).index_add_(0, owners, vectors * weights)
        totals = torch.zeros((len(request.inputs), 1)).index_add_(0, owners, weights)
        rows = (rows / totals)[:, : self.dimensions]
        if request.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        data = rows.contiguous().numpy().astype("<f4", copy=False).tobytes()
        return EmbedResult(rows=rows.shape[0], dimensions=self.dimensions, data=data)


class Embedder:
    """Makes vectors with a model of transformers.

    Args:
        model: Gives hidden states; in evaluation mode.
        tokenizer: Its own.
        context_length: Tokens of one text.
        pooling: The model's own.
        dimensions: Length of a vector.
        lora: Adapters of the model.
        adapters: Those that requests can name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context_length: int,
        pooling: str,
        dimensions: int,
        lora: Lora,
        adapters: Adapters,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._pooling = pooling
        self._dimensions = dimensions
        self._lora = lora
        self._adapters = adapters
        self._vocabulary_size = int(model.get_input_embeddings().weight.shape[0])

    def pieces(self, request: EmbedRequest) -> Pieces:
        """Tokenize. On any thread.

        Raises:
            ContextOverflowError: An input is too long, and may be neither cut nor chunked.
            ParameterRangeError: More dimensions than there are.
            RequestError: An input has no tokens, or has some that the model does not know.
        """
        dimensions = self._dimensions if request.dimensions is None else request.dimensions
        if not 1 <= dimensions <= self._dimensions:
            raise ParameterRangeError(
                f"dimensions is {dimensions}, it must be 1 … {self._dimensions}",
                parameter="dimensions",
                value=str(dimensions),
            )
        pieces = Pieces(request, dimensions, request.pooling or self._pooling, self._adapters.find(request.model))
        for index, given in enumerate(request.inputs):
            for tokens in self._split(given, index, request.truncate):
                pieces.tokens.append(tokens)
                pieces.owners.append(index)
        return pieces

    def _split(self, given: str | list[int], index: int, truncate: str) -> list[list[int]]:
        """The tokens of one input: whole, cut, or in pieces of the context's length.

        Each piece of a text begins and ends with the special tokens that the whole has.
        """
        before = after = 0
        if isinstance(given, list):
            tokens = prompt_tokens(self._tokenizer, None, None, given, vocabulary_size=self._vocabulary_size)
        else:
            encoded = self._tokenizer(given, return_special_tokens_mask=True, verbose=False)
            tokens = list(encoded["input_ids"])
            special = list(encoded["special_tokens_mask"])
            before = special.index(0) if 0 in special else 0
            after = special[::-1].index(0) if 0 in special else 0
        if not tokens:
            raise RequestError(f"input {index} has no tokens", input=index)
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
        begin, body, end = tokens[:before], tokens[before : len(tokens) - after], tokens[len(tokens) - after :]
        size = max(1, limit - before - after)
        count = 1 if truncate == "cut" else -(-len(body) // size)
        return [[*begin, *body[size * part : size * (part + 1)], *end] for part in range(count)]

    def vectors(
        self, pieces: Sequence[Sequence[int]], pooling: str, adapters: Sequence[Adapter | None] = ()
    ) -> torch.Tensor:
        """float32 (pieces, dimensions), on the host, in one forward pass."""
        width = max(len(piece) for piece in pieces)
        pad = self._tokenizer.pad_token_id or 0
        device = self._model.device
        ids = torch.tensor([[*piece, *[pad] * (width - len(piece))] for piece in pieces], device=device)
        lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        mask = (torch.arange(width, device=device).unsqueeze(0) < lengths.unsqueeze(1)).long()
        with self._lora.rows(adapters):
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return _POOLINGS[pooling](hidden, mask, lengths).cpu()


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
