"""Servers of Text Embeddings Inference, with a fake one: exactly what is sent, and what comes of its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.faulty import Asked, Script, api_worker, faulty, status, write_models
from zfabric.backends.hf_api.worker import HuggingfaceApiWorker
from zfabric.errors import (
    BackendError,
    ConfigurationError,
    ContextOverflowError,
    ParameterRangeError,
    RequestError,
    TooLargeError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.wire.payloads import CountRequest
from zfabric.wire.tasks import (
    ClassifyRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedTokensRequest,
    RewardRequest,
    ScoreRequest,
)


def told(make: Callable[[Any], Any]) -> Script:
    """A script whose answer is made of what was asked; a text is an error of status 413, as the server words it."""

    async def script(asked: Asked) -> None:
        body = make(asked.body)
        if isinstance(body, str):
            await status(413, json.dumps({"error": body, "error_type": "Validation"}))(asked)
        else:
            await status(200, json.dumps(body))(asked)

    return script


def path_of(asked: Asked) -> str:
    return asked.head.split()[1]


async def embed(worker: HuggingfaceApiWorker, *inputs: Any, **options: Any) -> list[list[float]]:
    result = await worker.embed(EmbedRequest(inputs=list(inputs), model="m", normalize=False, **options))
    rows: list[list[float]] = np.frombuffer(result.data, "<f4").reshape(result.rows, result.dimensions).tolist()
    return rows


async def test_vectors_with_a_prompt_by_its_name(tmp_path: Path) -> None:
    server_says = told(lambda body: [[len(text), 1] for text in body["inputs"]])
    async with faulty(server_says) as server, api_worker(tmp_path, server.url, protocol="tei") as worker:
        assert await embed(worker, "a", "bc", prompt_name="query", truncate="cut") == [[1, 1], [2, 1]]
        assert path_of(server.asked[0]) == "/embed"
        assert server.asked[0].body == {
            "inputs": ["a", "bc"], "truncate": True, "normalize": False, "prompt_name": "query",
        }  # fmt: skip
        (info,) = worker._infos()
        assert info.capabilities == ["embed", "embed_tokens", "score", "count_tokens", "tokenize", "detokenize"]


async def test_a_server_without_named_prompts_refuses_them(tmp_path: Path) -> None:
    async with api_worker(tmp_path, "http://127.0.0.1:1", protocol="embeddings") as worker:
        with pytest.raises(UnsupportedParameterError, match="prompt_name='query'"):
            await embed(worker, "a", prompt_name="query")
        with pytest.raises(UnsupportedOperationError, match="does not classify, its server speaks embeddings"):
            await worker.classify(ClassifyRequest(inputs=["x"], model="m"))


@pytest.mark.parametrize("told_limit", [True, False])
async def test_a_batch_that_is_too_large_is_split_and_the_limit_remembered(told_limit: bool, tmp_path: Path) -> None:
    def answer(body: Any) -> Any:
        if len(body["inputs"]) <= 2:
            return [[int(text)] for text in body["inputs"]]
        what = f"batch size {len(body['inputs'])} > maximum allowed batch size 2"
        return what if told_limit else "payload too large"

    keys = {"protocol": "tei", "batch_size": 8, "parallel": 1}
    async with faulty(told(answer)) as server, api_worker(tmp_path, server.url, **keys) as worker:
        texts = [str(number) for number in range(7)]
        assert await embed(worker, *texts) == [[number] for number in range(7)]
        assert [len(asked.body["inputs"]) for asked in server.asked] == (
            [7, 2, 2, 2, 1] if told_limit else [7, 4, 2, 2, 2, 1]
        )
        server.asked.clear()
        await embed(worker, *texts[:4])
        assert [len(asked.body["inputs"]) for asked in server.asked] == [2, 2]


async def test_what_no_split_makes_smaller_is_an_error(tmp_path: Path) -> None:
    for said, error in (
        ("payload too large", TooLargeError),
        ("`inputs` must have less than 512 tokens. Given: 600", ContextOverflowError),
    ):
        answer = told(lambda body, said=said: said)  # type: ignore[misc]
        async with faulty(answer) as server, api_worker(tmp_path, server.url, protocol="tei") as worker:
            with pytest.raises(error, match=said[:10]):
                await embed(worker, "a")
            assert len(server.asked) == 1


async def test_a_server_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    busy = status(429, json.dumps({"error": "Model is overloaded", "error_type": "overloaded"}), retry_after="0")
    async with (
        faulty(busy, told(lambda body: [[1]])) as server,
        api_worker(tmp_path, server.url, protocol="tei") as worker,
    ):
        assert await embed(worker, "a") == [[1]]
        assert len(server.asked) == 2


async def test_vectors_of_tokens(tmp_path: Path) -> None:
    answer = told(lambda body: [[[3, 4, 9]] * len(text) for text in body["inputs"]])
    async with faulty(answer) as server, api_worker(tmp_path, server.url, protocol="tei", batch_size=1) as worker:
        request = EmbedTokensRequest(inputs=["a", "bc"], model="m", dimensions=2, prompt_name="query")
        result = await worker.embed_tokens(request)
        assert (result.tokens, result.dimensions) == ([1, 2], 2)
        np.testing.assert_allclose(np.frombuffer(result.data, "<f4").reshape(-1, 2), [[0.6, 0.8]] * 3, atol=1e-6)
        assert {path_of(asked) for asked in server.asked} == {"/embed_all"}
        assert server.asked[0].body == {"inputs": ["a"], "truncate": False, "prompt_name": "query"}
        with pytest.raises(ParameterRangeError, match="has 3"):
            await worker.embed_tokens(EmbedTokensRequest(inputs=["a"], model="m", dimensions=4))
        with pytest.raises(RequestError, match="texts, not tokens"):
            await worker.embed_tokens(EmbedTokensRequest(inputs=[[1]], model="m"))


async def test_scores_of_a_reranker_and_of_vectors(tmp_path: Path) -> None:
    request = ScoreRequest(query="q", documents=["a", "abc", "ab"], model="m")

    def ranked(body: Any) -> Any:
        lines = [{"index": index, "score": len(text) / 10} for index, text in enumerate(body["texts"])]
        return sorted(lines, key=lambda line: -line["score"])

    keys = {"protocol": "tei", "task": "rerank", "batch_size": 2, "parallel": 1}
    async with faulty(told(ranked)) as server, api_worker(tmp_path, server.url, **keys) as worker:
        assert await worker.score(request) == [0.1, 0.3, 0.2]
        assert path_of(server.asked[0]) == "/rerank"
        assert server.asked[0].body == {"query": "q", "texts": ["a", "abc"], "raw_scores": False, "truncate": False}
        with pytest.raises(UnsupportedOperationError, match="does not embed"):
            await embed(worker, "a")
    compared = told(lambda body: [len(text) for text in body["inputs"]["sentences"]])
    async with faulty(compared) as server, api_worker(tmp_path, server.url, protocol="tei") as worker:
        assert await worker.score(request) == [1, 3, 2]
        assert path_of(server.asked[0]) == "/similarity"
        assert server.asked[0].body == {"inputs": {"source_sentence": "q", "sentences": ["a", "abc", "ab"]}}


async def test_classes_and_rewards(tmp_path: Path) -> None:
    def judged(body: Any) -> Any:
        """The likeliest class first, as the server has it."""
        shares = [len(text[0]) / 4 for text in body["inputs"]]
        lines = [[{"label": "long", "score": share}, {"label": "brief", "score": 1 - share}] for share in shares]
        return [sorted(line, key=lambda one: -one["score"]) for line in lines]

    keys = {"protocol": "tei", "task": "classify"}
    async with faulty(told(judged)) as server, api_worker(tmp_path, server.url, **keys) as worker:
        found = await worker.classify(ClassifyRequest(inputs=["abc", ["a", "pair"]], model="m"))
        assert (found.labels, found.probabilities) == (["brief", "long"], [[0.25, 0.75], [0.75, 0.25]])
        assert path_of(server.asked[0]) == "/predict"
        assert server.asked[0].body == {"inputs": [["abc"], ["a", "pair"]], "raw_scores": False, "truncate": False}
        with pytest.raises(UnsupportedOperationError, match="2 classes and no rewards"):
            await worker.reward(RewardRequest(inputs=["x"], model="m"))
        assert server.asked[1].body["raw_scores"] is True
        with pytest.raises(UnsupportedOperationError, match="texts, not chats"):
            await worker.reward(RewardRequest(inputs=[[{"role": "user", "content": "x"}]], model="m"))
    worth = told(lambda body: [[{"label": "worth", "score": 2.5}] for _ in body["inputs"]])
    async with faulty(worth) as server, api_worker(tmp_path, server.url, **keys) as worker:
        assert await worker.reward(RewardRequest(inputs=["x", "y"], model="m")) == [[2.5], [2.5]]


async def test_tokens_are_the_servers(tmp_path: Path) -> None:
    def answer(body: Any) -> Any:
        if "ids" in body:
            return ["".join(map(chr, body["ids"]))]
        return [[{"id": ord(letter), "text": letter, "special": False} for letter in body["inputs"]]]

    async with faulty(told(answer)) as server, api_worker(tmp_path, server.url, protocol="tei") as worker:
        assert await worker.tokenize(CountRequest(prompt="hi", model="m")) == [104, 105]
        assert await worker.count_tokens(CountRequest(prompt="hi!", model="m")) == 3
        assert await worker.detokenize(DetokenizeRequest(token_ids=[104, 105], model="m")) == "hi"
        assert [path_of(asked) for asked in server.asked] == ["/tokenize", "/tokenize", "/decode"]
        assert server.asked[2].body == {"ids": [104, 105], "skip_special_tokens": False}


async def test_garbage_is_told(tmp_path: Path) -> None:
    for garbage in ("[[1]", "{}", "[]"):
        script = status(200, garbage)
        async with (
            faulty(script) as server,
            api_worker(tmp_path, server.url, protocol="tei", task="classify") as worker,
        ):
            with pytest.raises(BackendError, match="not of its protocol"):
                await worker.classify(ClassifyRequest(inputs=["x"], model="m"))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"protocol": "tei", "server": "vllm"}, "'vllm' does not speak 'tei'"),
        ({"protocol": "chat", "server": "tei"}, "'tei' does not speak 'chat'"),
        ({"protocol": "embeddings", "task": "rerank"}, "goes with protocol 'tei'"),
        ({"protocol": "tei", "task": "generate"}, "it must be one of embed, rerank, classify"),
        ({"protocol": "completions", "reasoning": True}, "goes with 'chat' of 'openai'"),
    ],
)
async def test_a_wrong_entry_is_named(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    from zfabric.backends.hf_api.models_file import read_models_file

    with pytest.raises(ConfigurationError, match=said):
        await asyncio.to_thread(read_models_file, write_models(tmp_path / "models.json", "http://x", **entry))
