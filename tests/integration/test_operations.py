"""Operations beside text and vectors: dispatched by the model's name, and checked on their way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zfabric import AsyncClient, BaseModelWorker, ModelInfo
from zfabric.errors import (
    BackendError,
    ParameterRangeError,
    ProtocolError,
    RequestError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.testing import run_backend, serving
from zfabric.wire.payloads import CountRequest
from zfabric.wire.tasks import ClassifyRequest, DetokenizeRequest, ScoreRequest


class Reranker(BaseModelWorker):
    """Scores by length, with NumPy's numbers."""

    def __init__(self, name: str, *capabilities: str) -> None:
        self.name = name
        self.capabilities = list(capabilities)

    async def load(self) -> ModelInfo:
        return ModelInfo(name=self.name, capabilities=self.capabilities)

    async def tokenize(self, request: CountRequest) -> Any:
        return np.array([ord(character) for character in request.plain_text()])

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return "".join(map(chr, request.token_ids))

    async def score(self, request: ScoreRequest) -> Any:
        if request.query == "break":
            return ["no number"]
        return np.array([len(text) for text in request.documents][: 1 if request.query == "lose" else None])

    async def classify(self, request: ClassifyRequest) -> Any:
        return np.array([[0.25, 0.75] for _ in request.inputs], dtype=np.float32)


ALL = ("tokenize", "detokenize", "score", "classify")


async def test_each_is_dispatched_by_its_model() -> None:
    async with serving(Reranker("one", *ALL), Reranker("other", "score")) as client:
        tokens = await client.tokenize("one", "ab")
        assert tokens == [97, 98]
        assert await client.detokenize("one", tokens) == "ab"
        assert await client.score("other", "q", ["a", "abc", "ab"]) == [1.0, 3.0, 2.0]
        assert await client.rerank("other", "q", ["a", "abc", "ab"], top_n=2) == [(1, 3.0), (2, 2.0)]
        assert await client.classify("one", ["x", "y"], timeout=5) == [[0.25, 0.75]] * 2
        with pytest.raises(UnsupportedOperationError, match="classify"):
            await client.classify("other", "x")


async def test_what_a_backend_gives_is_checked() -> None:
    async with serving(Reranker("m", *ALL)) as client:
        with pytest.raises(BackendError):
            await client.score("m", "break", ["a"])
        with pytest.raises(ProtocolError, match="1 results came for 2 inputs"):
            await client.score("m", "lose", ["a", "b"])


async def test_wrong_arguments_are_named_before_anything_is_sent() -> None:
    client = AsyncClient("ipc:///nowhere/x")
    for call, error, name in (
        (client.score("m", "q", []), RequestError, "documents"),
        (client.score("m", 5, ["a"]), RequestError, "query"),  # type: ignore[arg-type]
        (client.rerank("m", "q", ["a"], top_n=0), ParameterRangeError, "top_n"),
        (client.classify("m", []), RequestError, "inputs"),
        (client.classify("m", "x", speed=1), UnsupportedParameterError, "speed"),  # type: ignore[call-arg]
        (client.detokenize("m", []), RequestError, "token_ids"),
        (client.detokenize("m", [-1]), RequestError, "token_ids"),
    ):
        with pytest.raises(error, match=name):
            await call


def test_the_blocking_client_has_them_too() -> None:
    with run_backend(Reranker("m", *ALL)) as client:
        assert client.detokenize("m", client.tokenize("m", "hi")) == "hi"
        assert client.rerank("m", "q", ["a", "bc"])[0] == (1, 2.0)
        assert client.score("m", "q", "abc") == [3.0]
        assert client.classify("m", "x") == [[0.25, 0.75]]
