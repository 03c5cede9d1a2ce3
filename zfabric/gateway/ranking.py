"""How well texts fit: /rerank as Jina and Cohere have it (https://jina.ai/reranker, https://docs.cohere.com/reference/rerank),
/score and /classify as vLLM has them (https://docs.vllm.ai/en/latest/models/pooling_models.html)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zfabric.errors import RequestError, TooLargeError
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.clock import created
from zfabric.gateway.decode import decode, decoder
from zfabric.gateway.sse import encode
from zfabric.gateway.together import together, with_count
from zfabric.limits import GATEWAY_INPUTS_MAX


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A document as a map."""

    text: str


class RerankRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /rerank. A `top_n` of 0 is all, as in vLLM."""

    model: str
    query: str
    documents: list[str | Document]
    priority: int = 0
    return_documents: bool = True
    timeout: float | None = None
    top_n: int | None = None
    user: str | None = None


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /score: one text beside each of many, or pairs of as many."""

    model: str
    text_1: str | list[str]
    text_2: str | list[str]
    priority: int = 0
    timeout: float | None = None
    user: str | None = None


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /classify."""

    model: str
    input: str | list[str]
    priority: int = 0
    timeout: float | None = None
    user: str | None = None


_RERANK: Final = decoder(RerankRequest)
_SCORE: Final = decoder(ScoreRequest)
_CLASSIFY: Final = decoder(ClassifyRequest)


async def rerank(call: Call) -> None:
    """Answer a call: the documents that fit a query best, the best one first."""
    request = decode(_RERANK, call.body)
    model = call.check_model(request.model)
    texts = [one if isinstance(one, str) else one.text for one in _bounded("documents", request.documents)]

    async def work() -> bytes:
        ranking = call.client.rerank(
            model, request.query, texts, top_n=request.top_n or None, priority=request.priority, timeout=request.timeout
        )
        # The query is read beside each document.
        found, tokens = await with_count(ranking, call.client, model, [*texts, *[request.query] * len(texts)])
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in found]
        if request.return_documents:
            results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return encode({"id": f"rerank-{call.id}", "model": model, "results": results, "usage": usage})

    await call.response.whole(200, await call.unless_left(work()))


async def score(call: Call) -> None:
    """Answer a call: a number for each pair of texts."""
    request = decode(_SCORE, call.body)
    model = call.check_model(request.model)
    second = [request.text_2] if isinstance(request.text_2, str) else _bounded("text_2", request.text_2)
    options: Any = {"priority": request.priority, "timeout": request.timeout}

    async def work() -> bytes:
        client = call.client
        if isinstance(request.text_1, str):
            scores = await client.score(model, request.text_1, second, **options)
        else:
            first = _paired(_bounded("text_1", request.text_1), second)
            pairs = zip(first, second, strict=True)
            each = await together(client.score(model, query, [text], **options) for query, text in pairs)
            scores = [found for [found] in each]
        return encode(_listed(call, model, [{"index": n, "object": "score", "score": s} for n, s in enumerate(scores)]))

    await call.response.whole(200, await call.unless_left(work()))


async def classify(call: Call) -> None:
    """Answer a call: the likeliest class and the probability of each, for each text."""
    request = decode(_CLASSIFY, call.body)
    model = call.check_model(request.model)
    inputs = [request.input] if isinstance(request.input, str) else _bounded("input", request.input)
    options: Any = {"priority": request.priority, "timeout": request.timeout}
    rows = await call.unless_left(call.client.classify(model, inputs, **options))
    data = [{"index": n, "label": row.label, "probs": row, "num_classes": len(row)} for n, row in enumerate(rows)]
    await call.response.whole(200, encode(_listed(call, model, data)))


ENDPOINTS: Final = (
    *(Endpoint("POST", path, rerank) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    *(Endpoint("POST", path, score) for path in ("/score", "/v1/score")),
    *(Endpoint("POST", path, classify) for path in ("/classify", "/v1/classify")),
)


def _listed(call: Call, model: str, data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": call.id, "object": "list", "created": created(), "model": model, "data": data}


def _bounded(name: str, items: list[Any]) -> list[Any]:
    """Raises: RequestError: There is none. TooLargeError: There are too many."""
    if not items:
        raise RequestError(f"{name} is empty", parameter=name)
    if len(items) > GATEWAY_INPUTS_MAX:
        raise TooLargeError(f"{name} has {len(items)} items, limit is {GATEWAY_INPUTS_MAX}", parameter=name)
    return items


def _paired(first: list[str], second: list[str]) -> list[str]:
    """As many of the first as there are of the second; one stands for all. Raises: RequestError."""
    if len(first) == 1:
        return first * len(second)
    if len(first) != len(second):
        raise RequestError(
            f"text_1 has {len(first)} texts and text_2 {len(second)}, they must be as many, or text_1 one",
            parameter="text_1",
        )
    return first
