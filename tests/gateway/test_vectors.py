"""/v1/embeddings, /pooling, /rerank, /score, /classify, /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.gateway.conftest import gateway
from zfabric import BaseModelWorker, CountRequest, EmbedRequest, EmbedResult, ModelInfo
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.wire.tasks import (
    ClassifyRequest,
    ClassifyResult,
    DetokenizeRequest,
    EmbedTokensRequest,
    EmbedTokensResult,
    RewardRequest,
    ScoreRequest,
)


class Ranker(BaseModelWorker):
    """Scores are lengths, tokens are characters, classes are vowels and others."""

    async def load(self) -> ModelInfo:
        abilities = ["score", "classify", "tokenize", "detokenize", "count_tokens", "embed", "embed_tokens", "reward"]
        return ModelInfo(name="ranker", capabilities=abilities, context_length=99)

    async def score(self, request: ScoreRequest) -> list[float]:
        return [len(document) / 100 + len(request.query) for document in request.documents]

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        shares = [sum(letter in "aeiou" for letter in text) / len(text) for text in request.inputs]
        return ClassifyResult([[share, 1 - share] for share in shares], ["vowel", "other"])

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """The length of the prompt's name, and that of the text."""
        sizes = [[len(request.prompt_name or ""), len(text)] for text in request.inputs]
        return EmbedResult(len(sizes), 2, np.array(sizes, dtype="<f4").tobytes())

    async def embed_tokens(self, request: EmbedTokensRequest) -> EmbedTokensResult:
        codes = [ord(letter) * (1 + request.normalize) for text in request.inputs for letter in str(text)]
        return EmbedTokensResult([len(text) for text in request.inputs], 1, np.array(codes, dtype="<f4").tobytes())

    async def reward(self, request: RewardRequest) -> list[list[float]]:
        return [[1.5 if isinstance(given, str) else len(given)] for given in request.inputs]

    async def tokenize(self, request: CountRequest) -> list[int]:
        return [ord(letter) for letter in request.plain_text()]

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return "".join(map(chr, request.token_ids))

    async def count_tokens(self, request: CountRequest) -> int:
        return len(request.plain_text())


class Stuck(BaseModelWorker):
    """Vectors that never come."""

    def __init__(self) -> None:
        self.begun, self.stopped = asyncio.Event(), asyncio.Event()

    async def load(self) -> ModelInfo:
        return ModelInfo(name="stuck", capabilities=["embed"], dimensions=4)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        self.begun.set()
        try:
            return await asyncio.Future()
        finally:
            self.stopped.set()


@pytest.mark.parametrize("form", ["float", "base64", None])
async def test_vectors_are_those_of_the_library(form: Any) -> None:
    async with gateway(EchoWorker()) as served:
        asked: Any = {} if form is None else {"encoding_format": form}
        answer = await served.openai.embeddings.create(model="echo", input=["one text", "another"], **asked)
        right = await served.fabric.embed("echo", ["one text", "another"])
        rows = [row.embedding for row in answer.data]
        if form == "base64":
            import base64

            rows = [list(struct.unpack("<8f", base64.b64decode(row))) for row in rows]  # type: ignore[arg-type]
        assert np.array_equal(np.array(rows, dtype=np.float32), right)
        assert [row.index for row in answer.data] == [0, 1]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)


async def test_vectors_of_one_text_of_tokens_and_of_fewer_dimensions() -> None:
    async with gateway(EchoWorker()) as served:
        create = served.openai.embeddings.create
        assert len((await create(model="echo", input="one")).data) == 1
        assert (await create(model="echo", input=[1, 2, 3])).usage.prompt_tokens == 3
        assert len((await create(model="echo", input=[[1], [2, 3]])).data) == 2
        assert len((await create(model="echo", input="one", dimensions=4)).data[0].embedding) == 4
        for change, parameter in (
            ({"dimensions": 99}, "dimensions"),
            ({"input": []}, "input"),
            ({"input": 5}, "input"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await create(model="echo", input="one", extra_body=change)
            assert refused.value.param == parameter
        with pytest.raises(openai.APIStatusError) as many:
            await create(model="echo", input=["x"] * 2_049)
        assert many.value.status_code == 413


async def test_a_caller_who_goes_away_stops_what_is_no_stream() -> None:
    stuck = Stuck()
    async with gateway(stuck) as served:
        asking = asyncio.create_task(served.openai.embeddings.create(model="stuck", input="x"))
        async with asyncio.timeout(10):
            await stuck.begun.wait()
            asking.cancel()
            await stuck.stopped.wait()


async def test_what_a_model_cannot_do_is_told() -> None:
    async with gateway(Ranker()) as served:
        with pytest.raises(openai.BadRequestError) as refused:
            await served.openai.completions.create(model="ranker", prompt="x")
        assert refused.value.code == "unsupported_operation"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_documents_are_ranked(path: str) -> None:
    async with gateway(Ranker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        asked = {"model": "ranker", "query": "q", "documents": ["aaa", {"text": "a"}, "aaaaa"], "top_n": 2}
        answer = (await web.post(path, json=asked)).json()
        assert [(row["index"], row["relevance_score"]) for row in answer["results"]] == [(2, 1.05), (0, 1.03)]
        assert answer["results"][0]["document"] == {"text": "aaaaa"}
        assert answer["usage"]["total_tokens"] == 9 + 3
        bare = (await web.post(path, json={**asked, "return_documents": False, "top_n": 0})).json()
        assert [set(row) for row in bare["results"]] == [{"index", "relevance_score"}] * 3


async def test_scores_of_one_text_and_of_pairs() -> None:
    async with gateway(Ranker()) as served, httpx.AsyncClient(base_url=served.url) as web:

        async def ask(first: Any, second: Any) -> Any:
            answer = await web.post("/v1/score", json={"model": "ranker", "text_1": first, "text_2": second})
            return [row["score"] for row in answer.json()["data"]] if answer.status_code == 200 else answer.status_code

        assert await ask("q", "a") == [1.01]
        assert await ask("q", ["a", "aa"]) == [1.01, 1.02]
        assert await ask(["q", "qq"], ["a", "aa"]) == [1.01, 2.02]
        assert await ask(["q"], ["a", "aa"]) == [1.01, 1.02]
        assert await ask(["q", "q"], ["a"]) == 400
        assert await ask("q", []) == 400


async def test_classes() -> None:
    async with gateway(Ranker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        answer = (await web.post("/classify", json={"model": "ranker", "input": ["ae", "ab"]})).json()
        assert [row["probs"] for row in answer["data"]] == [[1, 0], [0.5, 0.5]]
        assert [row["label"] for row in answer["data"]] == ["vowel", "vowel"]
        assert answer["data"][0]["num_classes"] == 2


async def test_a_prompt_is_called_by_its_name() -> None:
    async with gateway(Ranker()) as served:
        answer = await served.openai.embeddings.create(model="ranker", input="abc", extra_body={"prompt_name": "query"})
        assert answer.data[0].embedding == [5, 3]


async def test_whatever_a_pooling_model_makes() -> None:
    async with gateway(Ranker()) as served, httpx.AsyncClient(base_url=served.url) as web:

        async def ask(task: str, **given: Any) -> Any:
            answer = await web.post("/pooling", json={"model": "ranker", "task": task, **given})
            body = answer.json()
            return [row["data"] for row in body["data"]] if answer.status_code == 200 else body["error"]["param"]

        assert await ask("token_embed", input=["ab", "c"]) == [[[194], [196]], [[198]]]
        assert await ask("token_embed", input="a", use_activation=False) == [[[97]]]
        assert await ask("embed", input=["abc"], prompt_name="query") == [[5, 3]]
        assert await ask("classify", input="ab") == [[0.5, 0.5]]
        assert await ask("token_classify", input="ab") == [[[1.5]]]
        assert await ask("token_classify", messages=[{"role": "user", "content": "x"}] * 2) == [[[2]]]
        assert await ask("classify", input="ab", use_activation=False) == "use_activation"
        assert await ask("classify", input="ab", dimensions=1) == "dimensions"
        assert await ask("embed", messages=[{"role": "user", "content": "x"}]) == "messages"
        assert await ask("embed") == "input"
        whole = (await web.post("/pooling", json={"model": "ranker", "task": "embed", "input": "abc"})).json()
        assert (whole["object"], whole["data"][0]["object"], whole["usage"]["total_tokens"]) == ("list", "pooling", 3)


async def test_tokens_there_and_back() -> None:
    async with gateway(Ranker(), EchoWorker(EchoOptions())) as served, httpx.AsyncClient(base_url=served.url) as web:
        asked = {"model": "ranker", "prompt": "hé", "return_token_strs": True}
        answer = (await web.post("/tokenize", json=asked)).json()
        assert answer == {"count": 2, "max_model_len": 99, "tokens": [104, 233], "token_strs": ["h", "é"]}
        back = await web.post("/detokenize", json={"model": "ranker", "tokens": answer["tokens"]})
        assert back.json() == {"prompt": "hé"}
        refused = await web.post("/tokenize", json={**asked, "add_special_tokens": False})
        assert refused.json()["error"]["param"] == "add_special_tokens"
        assert (await web.post("/tokenize", json={"model": "ranker"})).status_code == 400
