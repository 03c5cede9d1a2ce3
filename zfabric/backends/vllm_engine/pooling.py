"""Vectors, classes, scores and rewards, by models that vLLM runs as pooling models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from zfabric.backends.front.embed_inputs import cosines, owners
from zfabric.backends.vllm_engine.compat.pooling import label_names, pooling_params
from zfabric.backends.vllm_engine.compat.rendering import tokens_input
from zfabric.backends.vllm_engine.prompts import Prompts
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
)


class Pooling:
    """Runs pooling requests; several texts of one call are in the engine at the same time.

    Args:
        engine: An `AsyncLLM`.
        prompts: Makes its inputs.
        tasks: What the engine says it can do.
        at_once: Texts of one call that are in the engine at a time: it serves in the order of arrival, so those of another call
            wait for no more than these.
    """

    def __init__(self, engine: Any, prompts: Prompts, tasks: Sequence[str], *, at_once: int = 1) -> None:
        self._engine = engine
        self._prompts = prompts
        self._tasks = frozenset(tasks)
        self._at_once = at_once
        self._labels = label_names(engine)
        self._calls = 0

    @property
    def embeds(self) -> bool:
        """Whether texts become vectors."""
        return "embed" in self._tasks

    @property
    def capabilities(self) -> list[str]:
        """Operations that the model can do."""
        found = ["embed"] * self.embeds + ["embed_tokens"] * ("token_embed" in self._tasks)
        found += ["classify"] * ("classify" in self._tasks)
        found += ["score"] * (self.embeds or "classify" in self._tasks)
        return found + ["reward"] * (self._reward_task is not None)

    @property
    def _reward_task(self) -> str | None:
        """What vLLM calls it: a head with one value judges the whole, other reward models each token or step."""
        if "classify" in self._tasks:
            return "classify" if len(self._labels) == 1 else None
        return "token_classify" if "token_classify" in self._tasks else None

    async def embed(self, request: EmbedRequest, adapter: Any) -> EmbedResult:
        """One vector per input. When cancelled, the engine drops what is left.

        Raises:
            UnsupportedParameterError: Another pooling than the model was started with.
            ParameterRangeError: More dimensions than there are.
            FabricError: See `EmbedInputs.pieces`.
        """
        self._require("embed")
        if request.pooling is not None:
            raise UnsupportedParameterError(
                "parameter 'pooling' is not supported by vllm, which takes it at its start (--pooler-config)",
                parameter="pooling",
                backend="vllm",
            )
        pieces = await self._prompts.pieces(request)
        # Vectors that are cut or averaged get their length afterwards.
        whole = request.dimensions is None and len(pieces) == len(request.inputs)
        parameters = pooling_params("embed", activate=request.normalize and whole)
        calls = [(piece.tokens, parameters) for piece in pieces]
        vectors = np.stack(await self._all(calls, request.request_id, request.priority, adapter))
        weights = np.array([[float(len(piece.tokens))] for piece in pieces])
        sums = np.zeros((len(request.inputs), vectors.shape[1]))
        totals = np.zeros((len(request.inputs), 1))
        np.add.at(sums, owners(pieces), vectors * weights)
        np.add.at(totals, owners(pieces), weights)
        matrix = sums / totals
        matrix = _finished(matrix, request.dimensions, normalize=request.normalize and not whole)
        return EmbedResult(len(request.inputs), matrix.shape[1], matrix.astype("<f4").tobytes())

    async def embed_tokens(self, request: EmbedTokensRequest, adapter: Any) -> EmbedTokensResult:
        """One vector per token of each input. Raises: as `embed`."""
        self._require("token_embed", "embed_tokens")
        pieces = await self._prompts.pieces(request)
        whole = request.dimensions is None
        parameters = pooling_params("token_embed", activate=request.normalize and whole)
        calls = [(piece.tokens, parameters) for piece in pieces]
        rows = await self._all(calls, request.request_id, request.priority, adapter)
        matrix = _finished(np.concatenate(rows), request.dimensions, normalize=request.normalize and not whole)
        return EmbedTokensResult([len(row) for row in rows], matrix.shape[1], matrix.astype("<f4").tobytes())

    async def classify(self, request: ClassifyRequest, adapter: Any) -> ClassifyResult:
        """The probability of each class, for each text or pair of texts."""
        self._require("classify")
        texts: list[str | list[int]] = [given for given in request.inputs if isinstance(given, str)]
        pieces = iter(await self._prompts.pieces(EmbedRequest(inputs=texts), prompted=False))
        calls: list[tuple[list[int], Any]] = []
        for given in request.inputs:
            if isinstance(given, str):
                calls.append((next(pieces).tokens, pooling_params("classify", activate=True)))
            else:
                pair, segments = await self._prompts.pair(*given)
                calls.append((pair, pooling_params("classify", activate=True, segments=segments)))
        vectors = await self._all(calls, request.request_id, request.priority, adapter)
        rows = [[float(value) for value in np.atleast_1d(vector)] for vector in vectors]
        named = all(len(row) == len(self._labels) for row in rows)
        return ClassifyResult(rows, self._labels if named else [])

    async def reward(self, request: RewardRequest, adapter: Any) -> list[list[float]]:
        """What each input is worth, as the model computes it: one number, or one for each token or step.

        Raises:
            UnsupportedOperationError: The model gives none, or messages and no chat template.
            ContextOverflowError: An input is too long.
        """
        task = self._reward_task
        if task is None:
            raise UnsupportedOperationError("this model gives no rewards", operation="reward")
        parameters = pooling_params(task, activate=False)
        calls = [(await self._prompts.judged(given), parameters) for given in request.inputs]
        vectors = await self._all(calls, request.request_id, request.priority, adapter)
        return [[float(value) for value in vector.ravel()] for vector in vectors]

    async def score(self, query: str, documents: Sequence[str], request_id: str, adapter: Any) -> list[float]:
        """How well each document fits the query: by a cross-encoder, else by the angle of their vectors.

        Raises:
            UnsupportedOperationError: The model does neither.
            RequestError: A cross-encoder with several classes.
        """
        if self.embeds:
            result = await self.embed(EmbedRequest(inputs=[query, *documents], request_id=request_id), adapter)
            return cosines(result)
        self._require("classify")
        pairs = [await self._prompts.pair(query, document) for document in documents]
        calls = [(pair, pooling_params("classify", activate=True, segments=segments)) for pair, segments in pairs]
        vectors = [np.atleast_1d(vector) for vector in await self._all(calls, request_id, 0, adapter)]
        if any(len(vector) != 1 for vector in vectors):
            raise RequestError(f"the model gives {len(vectors[0])} classes, a score needs a model with one")
        return [float(vector[0]) for vector in vectors]

    async def _all(
        self, calls: Sequence[tuple[list[int], Any]], request_id: str, priority: int, adapter: Any
    ) -> list[Any]:
        """What the engine makes of all these prompts, each with its parameters: an array for each."""
        self._calls += 1
        name = f"{request_id}-{self._calls}"

        places = asyncio.Semaphore(self._at_once)

        async def one(number: int, token_ids: list[int], parameters: Any) -> Any:
            async with places:
                outputs = self._engine.encode(
                    tokens_input(token_ids), parameters, f"{name}-{number}", lora_request=adapter, priority=priority
                )
                async for output in outputs:
                    if output.finished:
                        return output.outputs.data.float().numpy()
            raise RequestError("the engine gave no vector")

        tasks = [asyncio.ensure_future(one(number, *call)) for number, call in enumerate(calls)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            # One that fails is the failure of all; what is left of them ends in the engine, too.
            for task in tasks:
                task.cancel()

    def _require(self, task: str, operation: str | None = None) -> None:
        if task not in self._tasks:
            name = operation or task
            raise UnsupportedOperationError(f"this model does not {name}", operation=name)


def _finished(matrix: Any, dimensions: int | None, *, normalize: bool) -> Any:
    """Rows cut and of length 1, if that is wanted. Raises: ParameterRangeError: They are shorter."""
    if dimensions is not None:
        if not 1 <= dimensions <= matrix.shape[1]:
            raise ParameterRangeError(
                f"dimensions is {dimensions}, it must be 1 … {matrix.shape[1]}",
                parameter="dimensions",
                value=str(dimensions),
            )
        matrix = matrix[:, :dimensions]
    if normalize:
        norms = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix = matrix / np.maximum(norms, np.finfo(np.float32).tiny)
    return matrix
