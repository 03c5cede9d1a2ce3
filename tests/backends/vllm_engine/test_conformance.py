"""What every backend promises, asked of all of them at once: one fabric, one tiny model, three engines, and the echo."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import zfabric.testing
from tests.backends.vllm_engine.conftest import Borrowed, Served
from tests.fabric import fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import (
    ContextOverflowError,
    RequestCancelledError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.worker.capabilities import PARAMETERS

pytestmark = pytest.mark.asyncio(loop_scope="package")

#: By the name of the model: the transformers worker, vLLM's engine, and vLLM's own server behind hf-api.
ENGINES = ("here", "tiny", "plain")
EVERY = pytest.mark.parametrize("model", ["echo", *ENGINES])
PROMPT = "Once upon a time there was a fox"
#: Values that differ from the defaults, of parameters that some backend refuses.
OTHER: dict[str, Any] = {
    "use_beam_search": True, "best_of": 2, "n": 2, "typical_p": 0.5, "guided_regex": "a", "bad_words": ["x"],
    "prompt_logprobs": 1, "truncate_prompt": True, "top_k": 5, "stop": "x",
}  # fmt: skip


@pytest_asyncio.fixture(loop_scope="package")
async def client(served: Served, vllm_llama: Path, models_file: Path) -> AsyncIterator[AsyncClient]:
    """Of a fabric with all backends. At the end nothing may be left in it."""
    here = TransformersOptions(model=str(vllm_llama), model_names=("here",), dtype="float32", device="cpu", threads=1)
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as connected:
            await made.add_worker("w0", EchoWorker(EchoOptions(context_length=512)))
            await made.add_worker("w1", ModelWorker(here))
            await made.add_worker("w2", Borrowed(served[0]))
            await made.add_worker("w3", HuggingfaceApiWorker(HuggingfaceApiOptions(models=models_file)))
            yield connected
            async with asyncio.timeout(10):
                while any(worker.in_flight for worker in await connected.workers()):
                    await asyncio.sleep(0.01)


@EVERY
async def test_a_stream_is_the_answer_bit_by_bit(client: AsyncClient, model: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    stream = client.stream(model, PROMPT, **options)
    deltas = [delta async for delta in stream]
    whole = await client.generate(model, PROMPT, **options)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert deltas[-1].finish_reason == whole.finish_reason == "length"
    assert stream.usage is not None
    assert (stream.usage.completion_tokens, len(whole.token_ids)) == (24, 24)
    assert stream.usage.prompt_tokens == whole.usage.prompt_tokens == await client.count_tokens(model, PROMPT)


async def test_one_model_gives_one_answer_whichever_engine_runs_it(client: AsyncClient) -> None:
    answers = [
        await client.generate(model, PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True) for model in ENGINES
    ]
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert answers[0].text == answers[1].text == answers[2].text


@EVERY
async def test_a_seed_is_an_answer(client: AsyncClient, model: str) -> None:
    first, again = [await client.generate(model, PROMPT, max_new_tokens=16, seed=11, ignore_eos=True) for _ in range(2)]
    assert first.token_ids == again.token_ids


@pytest.mark.parametrize("model", ENGINES)
async def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: AsyncClient, model: str) -> None:
    free = await client.generate(model, PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True)
    stop = free.text[10:13]
    stopped = await client.generate(model, PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True, stop=stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"


@EVERY
async def test_what_is_not_honoured_is_refused_by_name(client: AsyncClient, model: str) -> None:
    details = await client.model_details(model)
    assert set(details.parameters or ()) <= PARAMETERS
    for name in OTHER.keys() - set(details.parameters or ()):
        with pytest.raises(UnsupportedParameterError, match=name):
            await client.generate(model, PROMPT, max_new_tokens=4, **{name: OTHER[name]})


@EVERY
async def test_a_prompt_that_is_too_long_is_told_with_both_numbers(client: AsyncClient, model: str) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        await client.generate(model, "a " * 600, max_new_tokens=4)
    assert caught.value.details["context_length"] == 512
    told = caught.value.details["prompt_tokens"]
    assert isinstance(told, int)
    assert told >= 512


@EVERY
async def test_a_stream_that_nobody_reads_on_is_stopped(client: AsyncClient, model: str) -> None:
    """That it left the engine is what the fixture waits for."""
    async with client.stream(model, PROMPT, max_new_tokens=400, temperature=0, ignore_eos=True) as stream:
        await anext(stream)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            async for _ in stream:
                pass
    assert (await client.generate(model, PROMPT, max_new_tokens=2)).usage.completion_tokens <= 2


@EVERY
async def test_operations_are_offered_or_refused_as_announced(client: AsyncClient, model: str) -> None:
    details = await client.model_details(model)
    if "embed" in details.capabilities:
        vectors = await client.embed(model, ["a fox", "a dog"])
        assert vectors.shape == (2, details.dimensions)
    else:
        with pytest.raises(UnsupportedOperationError):
            await client.embed(model, ["a fox"])


@EVERY
async def test_every_promise_is_kept(client: AsyncClient, model: str) -> None:
    """The list that authors' backends are asked, and that docs/backends.md has."""
    report = await zfabric.testing.examine(client, model, prompt=PROMPT)
    assert not report.broken, str(report)
    assert sum(finding.kept is True for finding in report.findings) >= 12


#: Conversations, and what their template is told.
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"role": "user", "content": "Hi"}], {}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}),
    ([{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}], {}),
    ([{"role": "user", "content": "Hi"}], {"add_generation_prompt": False}),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}], {"continue_final_message": True}),
    ([{"role": "user", "content": "Hi"}], {"chat_template_kwargs": {"bos_token": "<x>"}}),
]


@pytest.mark.parametrize(("messages", "options"), CHATS)
async def test_a_chat_is_the_same_prompt_everywhere(
    client: AsyncClient, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    """The transformers worker renders itself, vLLM by its own renderer, and hf-api with the model's tokenizer."""
    here, vllm, api = [await client.tokenize(model, messages=messages, **options) for model in ENGINES]
    assert here == vllm == api
