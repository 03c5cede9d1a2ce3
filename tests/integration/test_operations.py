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
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)


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
        rows: Any = np.array([[0.25, 0.75] for _ in request.inputs], dtype=np.float32)
        names = {"nameless": [], "lose": ["one name"]}
        return ClassifyResult(rows, names.get(str(request.inputs[0]), ["no", "yes"]))

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        names = ["document", "query"]
        if request.prompt_name not in names:
            raise ParameterRangeError(f"prompt_name is {request.prompt_name!r}", parameter="prompt_name")
        return EmbedResult(1, 1, np.float32(names.index(request.prompt_name)).tobytes())

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        """The vector of a character is its number, twice."""
        data: Any = np.array([[ord(character)] * 2 for text in request.inputs for character in str(text)], dtype="<f4")
        return EmbedTokensResult([len(text) - (text == "lose") for text in request.inputs], 2, data)

    async def reward(self, request: RewardRequest) -> Any:
        """One number for a text, one for each message of a chat."""
        return [[0.5] if isinstance(given, str) else range(len(given)) for given in request.inputs]


ALL = ("tokenize", "detokenize", "score", "classify", "embed", "embed_tokens", "reward")


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
        with pytest.raises(UnsupportedOperationError, match="reward"):
            await client.reward("other", "x")
        with pytest.raises(UnsupportedOperationError, match="embed_tokens"):
            await client.embed_tokens("other", "x")


async def test_classes_have_names() -> None:
    async with serving(Reranker("one", *ALL)) as client:
        [found] = await client.classify("one", [("a pair", "of texts")])
        assert (found, found.labels, found.label) == ([0.25, 0.75], ("no", "yes"), "yes")
        [nameless] = await client.classify("one", "nameless")
        assert (nameless, nameless.labels, nameless.label) == ([0.25, 0.75], (), None)


async def test_texts_and_chats_have_rewards() -> None:
    async with serving(Reranker("one", *ALL)) as client:
        chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        assert await client.reward("one", ["a text", chat]) == [[0.5], [0.0, 1.0]]


async def test_each_token_has_a_vector() -> None:
    async with serving(Reranker("one", *ALL)) as client:
        first, empty, last = await client.embed_tokens("one", ["ab", "", "c"], truncate="cut")
        assert first.tolist() == [[97, 97], [98, 98]]
        assert (empty.shape, last.tolist()) == ((0, 2), [[99, 99]])


async def test_a_prompt_is_called_by_its_name() -> None:
    async with serving(Reranker("one", *ALL)) as client:
        assert (await client.embed("one", "x", prompt_name="query")).tolist() == [[1]]
        with pytest.raises(ParameterRangeError, match="'title'"):
            await client.embed("one", "x", prompt_name="title")


async def test_what_a_backend_gives_is_checked() -> None:
    async with serving(Reranker("m", *ALL)) as client:
        with pytest.raises(BackendError):
            await client.score("m", "break", ["a"])
        with pytest.raises(ProtocolError, match="1 results came for 2 inputs"):
            await client.score("m", "lose", ["a", "b"])
        with pytest.raises(BackendError, match="1 names came for 2 classes"):
            await client.classify("m", "lose")
        with pytest.raises(BackendError, match="32 bytes came for 3 rows"):
            await client.embed_tokens("m", "lose")


async def test_wrong_arguments_are_named_before_anything_is_sent() -> None:
    client = AsyncClient("ipc:///nowhere/x")
    for call, error, name in (
        (client.score("m", "q", []), RequestError, "documents"),
        (client.score("m", 5, ["a"]), RequestError, "query"),  # type: ignore[arg-type]
        (client.rerank("m", "q", ["a"], top_n=0), ParameterRangeError, "top_n"),
        (client.classify("m", []), RequestError, "inputs"),
        (client.classify("m", "x", speed=1), UnsupportedParameterError, "speed"),  # type: ignore[call-arg]
        (client.classify("m", ["x", ["y"]]), RequestError, r"inputs\[1\] is a list of 1"),
        (client.reward("m", []), RequestError, "inputs"),
        (client.reward("m", ["x", []]), RequestError, r"inputs\[1\] is empty"),
        (client.reward("m", [[{"content": "x"}]]), RequestError, "no role"),
        (client.embed_tokens("m", "x", truncate="chunk"), RequestError, "truncate"),  # type: ignore[arg-type]
        (client.embed_tokens("m", "x", dimensions=0), ParameterRangeError, "dimensions"),
        (client.embed("m", "x", prompt_name=5), RequestError, "prompt_name"),  # type: ignore[arg-type]
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
        assert client.classify("m", "x")[0].label == "yes"
        assert client.reward("m", "x") == [[0.5]]
        assert client.embed_tokens("m", "x")[0].tolist() == [[120, 120]]
