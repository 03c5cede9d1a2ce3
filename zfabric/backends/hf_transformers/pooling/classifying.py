"""Texts and pairs of texts to classes, scores and rewards: one pass of a model with a head for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zfabric.backends.front.adapters import Adapters
from zfabric.backends.front.bounds import context_overflow, known_tokens
from zfabric.backends.front.embed_inputs import Piece
from zfabric.backends.front.prompts import PromptTokens
from zfabric.backends.hf_transformers.parameters.lora import Adapter
from zfabric.backends.hf_transformers.pooling.embedding import Pieces
from zfabric.backends.hf_transformers.pooling.heads import Head
from zfabric.errors import RequestError, UnsupportedOperationError
from zfabric.wire.chat import WHOLE
from zfabric.wire.tasks import ClassifyRequest, ClassifyResult, RewardRequest, ScoreRequest


class Judged(Pieces):
    """One request to a model with a head; its result are the logits of each input, (inputs, labels)."""

    def result(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(rows)).float()


class Classifier:
    """Makes pieces of requests to a model with a head, and answers of what it computes of them.

    Args:
        tokenizer: The model's.
        prompts: Makes tokens of texts and chats.
        head: The model's.
        context_length, vocabulary_size: What the model can read.
        adapters: Those that requests can name.
    """

    def __init__(
        self, tokenizer: Any, prompts: PromptTokens, head: Head, *, context_length: int, vocabulary_size: int,
        adapters: Adapters[Adapter],
    ) -> None:  # fmt: skip
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._head = head
        self._context_length = context_length
        self._vocabulary_size = vocabulary_size
        self._adapters = adapters

    @property
    def compares(self) -> bool:
        """Whether the model has one label, so that what it says of a text is a score or a reward."""
        return len(self._head.labels) == 1

    def classified(self, request: ClassifyRequest) -> Judged:
        """Tokenize. On any thread.

        Raises:
            ContextOverflowError: A text, or a pair, is too long.
        """
        inputs = [[given] if isinstance(given, str) else given for given in request.inputs]
        return self._pieces([self._piece(at, *texts) for at, texts in enumerate(inputs)], request.model)

    def scored(self, request: ScoreRequest) -> Judged:
        """As `classified`. Raises: RequestError: The model has several labels."""
        if not self.compares:
            raise RequestError(f"the model gives {len(self._head.labels)} classes, a score needs a model with one")
        pairs = enumerate(request.documents)
        return self._pieces([self._piece(at, request.query, document) for at, document in pairs], request.model)

    def rewarded(self, request: RewardRequest) -> Judged:
        """As `classified`.

        Raises:
            UnsupportedOperationError: The model has several labels, or messages are given and there is no chat template.
        """
        if not self.compares:
            raise UnsupportedOperationError(
                f"the model gives {len(self._head.labels)} classes and no rewards", operation="reward"
            )
        pieces: list[Piece] = []
        for at, given in enumerate(request.inputs):
            if isinstance(given, str):
                pieces.append(self._piece(at, given))
            else:
                pieces.append(self._fitting(self._prompts.make(None, given, None, chat=WHOLE), at, None))
        return self._pieces(pieces, request.model)

    def classes(self, logits: torch.Tensor) -> ClassifyResult:
        """The answer to a request for classes."""
        return ClassifyResult(self._head.probabilities(logits), list(self._head.labels))

    def scores(self, logits: torch.Tensor) -> list[float]:
        """The answer to a request for scores."""
        return [row[0] for row in self._head.probabilities(logits)]

    def _piece(self, owner: int, text: str, second: str | None = None) -> Piece:
        encoded = self._tokenizer(text, second, return_token_type_ids=self._head.typed, verbose=False)
        return self._fitting(list(encoded["input_ids"]), owner, encoded.get("token_type_ids"))

    def _fitting(self, tokens: list[int], owner: int, types: list[int] | None) -> Piece:
        if len(tokens) > self._context_length:
            raise context_overflow(len(tokens), self._context_length)
        if not tokens:
            raise RequestError(f"input {owner} has no tokens", input=owner)
        if self._head.pad_token is not None:
            while len(tokens) > 1 and tokens[-1] == self._head.pad_token:
                tokens = tokens[:-1]
        return Piece(known_tokens(tokens, self._vocabulary_size), owner, types=None if types is None else list(types))

    def _pieces(self, pieces: list[Piece], model: str) -> Judged:
        return Judged(pieces, self._head.pooler.modes, self._adapters.find(model))
