"""/v1/embeddings, /rerank, /score, /classify, /tokenize and /detokenize."""

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
from zfabric.wire.tasks import ClassifyRequest, DetokenizeRequest, ScoreRequest


class Ranker(BaseModelWorker):
    """Scores are lengths, tokens are characters, classes are vowels and others."""

    async def load(self) -> ModelInfo:
        abilities = ["score", "classify", "tokenize", "detokenize", "count_tokens"]
        return ModelInfo(name="ranker", capabilities=abilities, context_length=99)

    async def score(self, request: ScoreRequest) -> list[float]:
        return [len(document) / 100 + len(request.query) for document in request.documents]

    async def classify(self, request: ClassifyRequest) -> list[list[float]]:
        shares = [sum(letter in "aeiou" for letter in text) / len(text) for text in request.inputs]
        return [[share, 1 - share] for share in shares]

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
            await served.openai.embeddings.create(model="ranker", input="x")
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
        assert answer["data"][0]["num_classes"] == 2


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
