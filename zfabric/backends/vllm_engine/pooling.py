"""Embeddings, classes and scores, by models that vLLM runs as pooling models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from zfabric.backends.front.embed_inputs import owners
from zfabric.backends.vllm_engine.compat.pooling import pooling_params
from zfabric.backends.vllm_engine.compat.rendering import tokens_input
from zfabric.backends.vllm_engine.prompts import Prompts
from zfabric.errors import ParameterRangeError, RequestError, UnsupportedOperationError, UnsupportedParameterError
from zfabric.wire.tasks import EmbedRequest, EmbedResult


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
        self._calls = 0

    @property
    def embeds(self) -> bool:
        """Whether texts become vectors."""
        return "embed" in self._tasks

    @property
    def classifies(self) -> bool:
        """Whether texts get a probability of each class."""
        return "classify" in self._tasks

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
        vectors = await self._all(calls, request.request_id, request.priority, adapter)
        weights = np.array([[float(len(piece.tokens))] for piece in pieces])
        sums = np.zeros((len(request.inputs), vectors.shape[1]))
        totals = np.zeros((len(request.inputs), 1))
        np.add.at(sums, owners(pieces), vectors * weights)
        np.add.at(totals, owners(pieces), weights)
        matrix = sums / totals
        if request.dimensions is not None:
            if not 1 <= request.dimensions <= matrix.shape[1]:
                raise ParameterRangeError(
                    f"dimensions is {request.dimensions}, it must be 1 … {matrix.shape[1]}",
                    parameter="dimensions",
                    value=str(request.dimensions),
                )
            matrix = matrix[:, : request.dimensions]
        if request.normalize and not whole:
            norms = np.linalg.norm(matrix, axis=1, keepdims=True)
            matrix = matrix / np.maximum(norms, np.finfo(np.float32).tiny)
        return EmbedResult(len(request.inputs), matrix.shape[1], matrix.astype("<f4").tobytes())

    async def classify(self, inputs: Sequence[str], request_id: str, adapter: Any) -> list[list[float]]:
        """The probability of each class, for each text."""
        self._require("classify")
        pieces = await self._prompts.pieces(EmbedRequest(inputs=list(inputs)), prompted=False)
        parameters = pooling_params("classify", activate=True)
        vectors = await self._all([(piece.tokens, parameters) for piece in pieces], request_id, 0, adapter)
        return [[float(value) for value in vector] for vector in vectors]

    async def score(self, query: str, documents: Sequence[str], request_id: str, adapter: Any) -> list[float]:
        """How well each document fits the query: by a cross-encoder, else by the angle of their vectors.

        Raises:
            UnsupportedOperationError: The model does neither.
            RequestError: A cross-encoder with several classes.
        """
        if self.embeds:
            result = await self.embed(EmbedRequest(inputs=[query, *documents], request_id=request_id), adapter)
            matrix = np.frombuffer(result.data, dtype="<f4").reshape(result.rows, result.dimensions)
            return [float(value) for value in matrix[1:] @ matrix[0]]
        self._require("classify")
        pairs = [await self._prompts.pair(query, document) for document in documents]
        calls = [(pair, pooling_params("classify", activate=True, segments=segments)) for pair, segments in pairs]
        vectors = await self._all(calls, request_id, 0, adapter)
        if any(len(vector) != 1 for vector in vectors):
            raise RequestError(f"the model gives {len(vectors[0])} classes, a score needs a model with one")
        return [float(vector[0]) for vector in vectors]

    async def _all(
        self, calls: Sequence[tuple[list[int], Any]], request_id: str, priority: int, adapter: Any
    ) -> np.ndarray[Any, Any]:
        """The vectors of all these prompts, each with its parameters."""
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
            return np.stack([np.atleast_1d(vector) for vector in await asyncio.gather(*tasks)])
        finally:
            # One that fails is the failure of all; what is left of them ends in the engine, too.
            for task in tasks:
                task.cancel()

    def _require(self, task: str) -> None:
        if task not in self._tasks:
            raise UnsupportedOperationError(f"this model does not {task}", operation=task)
