"""LiteLLM as a client, by its names for OpenAI's API and for vLLM's."""

from __future__ import annotations

import asyncio
import os
from typing import Any

# Its table of prices is in the package; it would fetch a newer one.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import pytest

from tests.clients.conftest import MODEL, Served

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def options(served: Served, prefix: str) -> dict[str, Any]:
    place = {"api_base": served.url, "api_key": "none", "num_retries": 0}
    return {"model": f"{prefix}/{MODEL}", "messages": QUESTION, "max_tokens": 24, "temperature": 0, **place}


@pytest.mark.parametrize("prefix", ["openai", "hosted_vllm"])
def test_a_chat_whole_and_as_a_stream(served: Served, prefix: str) -> None:
    answer = litellm.completion(**options(served, prefix))
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.usage.completion_tokens > 3
    chunks = list(litellm.completion(**options(served, prefix), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text

    async def ask() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**options(served, prefix)) for _ in range(3)))

    assert {one.choices[0].message.content for one in asyncio.run(ask())} == {text}


def test_completions_and_errors(served: Served) -> None:
    asked = {"api_base": served.url, "api_key": "none", "max_tokens": 8, "temperature": 0}
    assert litellm.text_completion("Once upon a time", f"text-completion-openai/{MODEL}", **asked).choices[0].text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options(served, "openai"), "model": "openai/nobody"})
    long = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**options(served, "openai"), "messages": long})


def test_vectors(minilm: Served) -> None:
    told = litellm.embedding("openai/minilm", input=["a cat", "a dog"], api_base=minilm.url, api_key="none")
    assert [len(row["embedding"]) for row in told.data] == [384, 384]
