"""Bodies that are nearly those of a request: whatever stands in a field, the answer is one or says what is wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
from msgspec.structs import replace

from tests.gateway.conftest import gateway
from zfabric import ModelInfo
from zfabric.backends.echo import EchoWorker
from zfabric.wire.chat import OPTIONS
from zfabric.wire.payloads import CountRequest
from zfabric.wire.sampling import ALL_PARAMETERS
from zfabric.wire.tasks import ClassifyRequest, ClassifyResult, DetokenizeRequest, ScoreRequest

_FUNCTION: Final = {"name": "f", "description": "d", "parameters": {"type": "object"}}
_FORMAT: Final = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
_CALL: Final = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_PIXEL: Final = "data:image/png;base64,AAAA"

#: A good request of each API.
GOOD: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "model": "anything", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}, "n": 1, "seed": 1,
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": _PIXEL}}]},
            {"role": "assistant", "content": "x", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "r"},
        ],
        "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "auto", "logit_bias": {"5": 1}, "stop": ["x"],
        "response_format": _FORMAT, "logprobs": True, "top_logprobs": 2, "documents": [{}], "chat_template_kwargs": {},
    },
    "/v1/completions": {
        "model": "anything", "prompt": ["x", "y"], "max_tokens": 3, "logprobs": 1, "stop": ["x"], "echo": False,
        "structured_outputs": {"choice": ["a"]}, "stream_options": None, "logit_bias": {"5": 1}, "guided_json": {},
    },
    "/v1/responses": {
        "model": "anything", "max_output_tokens": 3, "reasoning": {"effort": "low"}, "metadata": {}, "stream": True,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}, "tools": [{"type": "function", **_FUNCTION}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "include": ["message.output_text.logprobs"],
    },
    "/v1/messages": {
        "model": "anything", "max_tokens": 3, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": ""},
                    {"type": "tool_use", "id": "a", "name": "n", "input": {}},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"}, "output_config": {"effort": "low"},
        "thinking": {"type": "enabled", "budget_tokens": 3},
    },
    "/v1/embeddings": {"model": "anything", "input": ["x"], "encoding_format": "base64", "dimensions": 2},
    "/v1/rerank": {"model": "anything", "query": "x", "documents": ["x", {"text": "y"}], "top_n": 1},
    "/v1/score": {"model": "anything", "text_1": "x", "text_2": ["y"]},
    "/pooling": {"model": "anything", "input": "x"},
    "/classify": {"model": "anything", "input": ["x"]},
    "/tokenize": {"model": "anything", "messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True},
    "/detokenize": {"model": "anything", "tokens": [1]},
    "/generate": {"model": "anything", "prompt": "x", "max_tokens": 2},
    "/inference/v1/generate": {"model": "anything", "token_ids": [1, 2], "sampling_params": {"max_tokens": 2}},
}  # fmt: skip
#: What is put in the place of something else.
VALUES: Final[tuple[Any, ...]] = (
    None, True, 0, -1, 3, 2**63, -(2**70), 1e308, "", "x", "\ud800", [], [None], ["x"], [[1, 2], [3]], {}, {"a": {"b": [1]}},
    {"type": "json_schema"}, {"type": ["function"]}, _PIXEL, "é" * 5_000, [{}], [[]], [{"type": "text", "text": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}], [{"type": "image_url", "image_url": 3}],
)  # fmt: skip


class Anything(EchoWorker):
    """Takes all that there is, so that much of it comes through to where messages and tools are read."""

    parameters = (ALL_PARAMETERS | set(OPTIONS)) - {"n", "best_of"}

    async def load(self) -> ModelInfo:
        operations = ["generate", "embed", "count_tokens", "tokenize", "detokenize", "score", "classify"]
        info = await super().load()
        return replace(info, name="anything", capabilities=[*operations, "chat", "multimodal"])

    async def tokenize(self, request: CountRequest) -> list[int]:
        return list(range(len(request.plain_text())))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        return "x" * len(request.token_ids)

    async def score(self, request: ScoreRequest) -> list[float]:
        return [1.0] * len(request.documents)

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        return ClassifyResult([[1.0, 0.0]] * len(request.inputs), ["a", "b"])


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a body."""
    yield here
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*here, key))


def mutated(body: dict[str, Any], draw: random.Random) -> Any:
    """A body with another value in one place or two."""
    changed: Any = copy.deepcopy(body)
    for _ in range(draw.choice((1, 1, 2))):
        *way, last = draw.choice([place for place in places(changed) if place] or [("model",)])
        within = changed
        for key in way:
            within = within[key]
        within[last] = copy.deepcopy(draw.choice(VALUES))
    return changed


@pytest.mark.parametrize("path", GOOD)
async def test_no_body_makes_the_gateway_fail(path: str) -> None:
    draw = random.Random(path)
    async with gateway(Anything()) as served, httpx.AsyncClient(base_url=served.url, timeout=30) as web:
        for _ in range(150):
            body = json.dumps(mutated(GOOD[path], draw))
            answer = await web.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code < 500 or answer.status_code in (501, 503), (body, answer.text)
            assert "Error:" not in answer.text, (body, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], body
    assert [event for event, _ in served.logged if event == "internal_error"] == []
