"""Real models behind the gateway: what comes out is what transformers makes of the same."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest_asyncio
import torch
from anthropic import AsyncAnthropic
from pydantic import BaseModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.gateway.conftest import Served, gateway
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.models.wheels import prepare


class City(BaseModel):
    """What an answer has to be an object of."""

    name: Literal["Paris", "Rome"]
    big: bool


CHAT: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def worker(name: str) -> ModelWorker:
    options = TransformersOptions(model=str(prepare(name)), model_names=(name,), dtype="float32", device="cpu")
    return ModelWorker(options)


@pytest_asyncio.fixture
async def smollm2() -> AsyncIterator[Served]:
    """SmolLM2-135M-Instruct."""
    async with gateway(worker("smollm2")) as served:
        yield served


async def test_smollm2_says_what_generate_says(smollm2: Served) -> None:
    directory: Path = prepare("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    with torch.no_grad():
        right = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0][length:]
    text = tokenizer.decode(right, skip_special_tokens=True)

    options: Any = {"model": "smollm2", "messages": CHAT, "max_tokens": 24, "temperature": 0}
    answer = await smollm2.openai.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == length
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    with torch.no_grad():
        logits = model(torch.cat([prompt["input_ids"][0], right])[None]).logits[0][length - 1 : -1]
    likely = torch.log_softmax(logits, -1).max(-1).values.tolist()
    assert np.allclose([entry.logprob for entry in entries], likely[: len(entries)], atol=1e-3)

    stream = await smollm2.openai.chat.completions.create(**options, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text

    # The old API from the chat's tokens goes the same way.
    ids: list[int] = prompt["input_ids"][0].tolist()
    old = await smollm2.openai.completions.create(model="smollm2", prompt=ids, max_tokens=24, temperature=0)
    assert old.choices[0].text == text


async def test_responses_and_messages_say_what_a_chat_says(smollm2: Served) -> None:
    chat = await smollm2.openai.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=12, temperature=0)
    text = chat.choices[0].message.content
    assert chat.usage is not None
    counts = (chat.usage.prompt_tokens, chat.usage.completion_tokens)

    asked: Any = {"model": "smollm2", "input": CHAT, "max_output_tokens": 12, "temperature": 0}
    response = await smollm2.openai.responses.create(**asked)
    assert response.output_text == text
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == counts
    async with smollm2.openai.responses.stream(**asked) as stream:
        final = await stream.get_final_response()
    assert (final.output_text, final.status) == (text, response.status)

    wanted: Any = {"model": "smollm2", "messages": CHAT, "max_tokens": 12, "extra_body": {"temperature": 0}}
    async with AsyncAnthropic(base_url=smollm2.url, api_key="x", max_retries=0) as anthropic_client:
        message = await anthropic_client.messages.create(**wanted)
        assert [block.text for block in message.content if block.type == "text"] == [text]
        assert (
            message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0),
            message.usage.output_tokens,
        ) == counts
        async with anthropic_client.messages.stream(**wanted) as events:
            assert "".join([piece async for piece in events.text_stream]) == text


async def test_smollm2_keeps_to_a_schema(smollm2: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    for extra in ({"response_format": form}, {"extra_body": {"guided_json": schema}}):
        options: Any = {"model": "smollm2", "messages": CHAT, "temperature": 0, "max_tokens": 60, **extra}
        answer = await smollm2.openai.chat.completions.create(**options)
        said = json.loads(answer.choices[0].message.content or "")
        assert set(said) == {"city", "big"}
        assert isinstance(said["big"], bool)
    parsed = await smollm2.openai.chat.completions.parse(
        model="smollm2", messages=CHAT, temperature=0, max_tokens=60, response_format=City
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


async def test_minilm_gives_the_mean_of_its_last_layer() -> None:
    """Pooling as the model's card says: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2."""
    texts = ["A cat sits on a mat.", "Stock prices fell."]
    tokenizer = AutoTokenizer.from_pretrained(prepare("minilm"))
    model = AutoModel.from_pretrained(prepare("minilm"), dtype=torch.float32)
    right = []
    for text in texts:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        right.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    async with gateway(worker("minilm")) as served:
        answer = await served.openai.embeddings.create(model="minilm", input=texts)
        assert np.allclose(np.array([row.embedding for row in answer.data]), np.array(right), atol=1e-4)
        assert answer.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
