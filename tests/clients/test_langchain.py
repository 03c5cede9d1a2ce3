"""LangChain's package for OpenAI's API."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.clients.conftest import MODEL, Served

TALK = [SystemMessage("You are a helpful assistant."), HumanMessage("What is the capital of France?")]


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]


def chat(served: Served, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=served.url, api_key="none", model=MODEL, temperature=0, max_tokens=24, **more)


def test_a_chat_whole_as_a_stream_and_as_a_batch(served: Served) -> None:
    model = chat(served)
    answer = model.invoke(TALK)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 3
    chunks = list(model.stream(TALK))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert {one.content for one in model.batch([TALK] * 3)} == {answer.content}

    async def read() -> str:
        return "".join([chunk.content async for chunk in model.astream(TALK)])

    assert asyncio.run(read()) == answer.content


def test_structured_outputs_and_tools(served: Served) -> None:
    assert isinstance(chat(served).with_structured_output(City, method="json_schema").invoke(TALK), City)

    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"Sunny in {city}."

    answer = chat(served).bind_tools([weather]).invoke(TALK)
    assert answer.content or answer.tool_calls


def test_vectors(minilm: Served) -> None:
    # Its own counting of tokens is of OpenAI's models, and fetches their tables.
    made = OpenAIEmbeddings(base_url=minilm.url, api_key="none", model="minilm", check_embedding_ctx_length=False)
    assert [len(row) for row in made.embed_documents(["a cat", "a dog"])] == [384, 384]
    assert len(made.embed_query("a cat")) == 384
