"""ModelWorker behind a real fabric: what it makes arrives whole at the client."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from tests.backends.test_engine import hold
from tests.backends.test_lora import save_adapter
from tests.fabric import Fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.errors import (
    ContextOverflowError,
    DeadlineExceededError,
    EngineStalledError,
    UnknownModelError,
    UnsupportedParameterError,
)

Served = tuple[Fabric, AsyncClient]


@pytest_asyncio.fixture
async def served(tiny_llama: Path) -> AsyncIterator[Served]:
    """Two workers on the same tiny model."""
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            for name in ("w0", "w1"):
                options = TransformersOptions(
                    model=str(tiny_llama), model_names=("tiny", "alias"), dtype="float32", device="cpu", threads=1
                )
                await made.add_worker(name, ModelWorker(options))
            yield made, client


async def test_choices_and_logprobs_arrive_whole(served: Served) -> None:
    _, client = served
    completion = await client.generate(
        "alias", "Hello", n=2, seed=1, logprobs=2, prompt_logprobs=0, max_new_tokens=7, ignore_eos=True
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.choices[0].token_ids != completion.choices[1].token_ids
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert [entry.token.token_id for entry in choice.logprobs] == choice.token_ids
        assert all(len(entry.top) == 2 for entry in choice.logprobs)
        assert choice.finish_reason == "length"
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == 14


async def test_echo_stop_and_errors_arrive(served: Served) -> None:
    _, client = served
    free = await client.generate("tiny", "Hello", temperature=0, max_new_tokens=30, ignore_eos=True)
    stop = free.text[8:11]
    stopped = await client.generate(
        "tiny", "Hello", temperature=0, max_new_tokens=30, ignore_eos=True, stop=stop, echo=True
    )
    assert stopped.text == "Hello" + free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    with pytest.raises(ContextOverflowError):
        await client.generate("tiny", "x" * 600)
    with pytest.raises(UnsupportedParameterError, match="top_k"):
        await client.generate("tiny", "x", use_beam_search=True, n=2, top_k=3)


async def test_guided_answers_and_the_best_of_several_arrive(served: Served) -> None:
    _, client = served
    guided = await client.generate("tiny", "Hello", seed=1, temperature=50, guided_regex="[ab]{16}", best_of=3, n=2)
    assert [re.fullmatch("[ab]{16}", choice.text) is not None for choice in guided.choices] == [True, True]
    assert guided.choices[0].text != guided.choices[1].text


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 11}])
async def test_a_stream_migrates_between_workers_without_a_trace(served: Served, sampling: dict[str, float]) -> None:
    """The worker that serves is drained in mid-stream; the text is that of an undisturbed run."""
    made, client = served
    options = {"max_new_tokens": 300, "ignore_eos": True, **sampling}
    undisturbed = await client.generate("tiny", "Once upon a time", **options)  # type: ignore[arg-type]
    stream = client.stream("tiny", "Once upon a time", **options)  # type: ignore[arg-type]
    first = await anext(stream)
    assert len(first.token_ids) < 300
    origin = stream.worker
    assert origin is not None
    service, task = made.services.pop(origin), made.tasks.pop(origin)
    await service.drain(1)
    await task
    async for _ in stream:
        pass
    assert stream.worker != origin
    assert stream.text == undisturbed.text
    assert stream.usage is not None
    # What of the prompt was cached is told by whoever computed it last, and it depends on what that one had before.
    assert structs.replace(stream.usage, cached_tokens=0) == structs.replace(undisturbed.usage, cached_tokens=0)


async def test_a_stream_outlives_an_engine_that_hangs(tiny_llama: Path) -> None:
    """The worker notices it and ends with that error; its stream goes on at another, at the same text."""

    def worker(**more: Any) -> ModelWorker:
        options = {"model": str(tiny_llama), "model_names": ("tiny",), "dtype": "float32", "device": "cpu", **more}
        return ModelWorker(TransformersOptions(**options))

    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            failing = worker(stall_ms=1_000)
            await made.add_worker("w0", failing)
            undisturbed = await client.generate("tiny", "Once", seed=3, max_new_tokens=300, ignore_eos=True)
            stream = client.stream("tiny", "Once", seed=3, max_new_tokens=300, ignore_eos=True)
            await anext(stream)
            gate = hold(failing)
            await made.add_worker("w1", worker())
            async for _ in stream:
                pass
            made.services.pop("w0")
            with pytest.raises(EngineStalledError):
                await made.tasks.pop("w0")
            gate.set()
            assert stream.worker == "w1"
            assert stream.text == undisturbed.text


async def test_many_at_once_are_batched_and_right(served: Served) -> None:
    _, client = served
    prompts = [f"prompt {n} " * (n % 5 + 1) for n in range(24)]
    alone = [await client.generate("tiny", p, temperature=0, max_new_tokens=12, ignore_eos=True) for p in prompts[:4]]
    together = await asyncio.gather(
        *(client.generate("tiny", p, temperature=0, max_new_tokens=12, ignore_eos=True) for p in prompts)
    )
    assert [c.token_ids for c in together[:4]] == [c.token_ids for c in alone]
    assert {c.worker for c in together} == {"w0", "w1"}


async def test_an_adapter_comes_and_goes_by_an_operators_call(served: Served, tiny_llama: Path, tmp_path: Path) -> None:
    _, client = served
    adapter = save_adapter(tmp_path / "red", tiny_llama, 1)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    assert set(await client.operate("w0", "load_adapter", name="red", path=str(adapter))) == {"red"}
    red = await client.generate("red", "Hello", **options)
    plain = await client.generate("tiny", "Hello", **options)
    assert red.text != plain.text
    assert await client.operate("w0", "unload_adapter", name="red") == {}
    # A model that lost its last worker is waited for.
    with pytest.raises(DeadlineExceededError):
        await client.generate("red", "Hello", deadline_ms=200, **options)


async def test_adapters_of_a_directory_are_loaded_when_they_are_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    """One place, two adapters: each is loaded by the request for it, and gives way to the other. Names are never paths."""
    for seed, name in enumerate(("red", "blue"), 1):
        save_adapter(tmp_path / "adapters" / name, tiny_llama, seed)
    save_adapter(tmp_path / "outside", tiny_llama, 3)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        endpoint = f"ipc://{directory}/c.sock"
        async with fabric(endpoint, adapters_per_host=1) as made, AsyncClient(made.endpoint) as client:
            backend = TransformersOptions(
                model=str(tiny_llama), model_names=("tiny",), dtype="float32", device="cpu", threads=1,
                adapters_dir=tmp_path / "adapters",
            )  # fmt: skip
            await made.add_worker("w0", ModelWorker(backend))
            texts = [(await client.generate(name, "Hello", **options)).text for name in ("red", "blue", "red", "tiny")]
            for name in ("../outside", str(tmp_path / "outside"), "outside"):
                with pytest.raises(UnknownModelError):
                    await client.generate(name, "Hello", **options)
            loaded = await client.operate("w0", "list_adapters")
    assert set(loaded) == {"red"}
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3
