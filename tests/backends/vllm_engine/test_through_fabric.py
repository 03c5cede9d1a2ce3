"""VLLMWorker behind a real fabric: messages, ends, deaths, adapters."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.backends.vllm_engine.conftest import TINY, Borrowed, Served
from tests.fabric import Fabric, Process, fabric, processes
from zfabric import AsyncClient
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import DeadlineExceededError, UnsupportedParameterError, WorkerLostError

pytestmark = pytest.mark.asyncio(loop_scope="package")

LONG: dict[str, Any] = {"max_new_tokens": 480, "ignore_eos": True, "temperature": 0}


@pytest_asyncio.fixture(loop_scope="package")
async def fabric_of_one(served: Served) -> AsyncIterator[tuple[Fabric, AsyncClient, VLLMWorker]]:
    """A fabric with the tiny model at one worker."""
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with fabric(f"ipc://{directory}/c.sock") as made, AsyncClient(made.endpoint) as client:
            worker = Borrowed(served[0])
            await made.add_worker("w0", worker)
            yield made, client, worker


def unfinished(worker: VLLMWorker) -> int:
    assert worker._runtime is not None
    return int(worker._runtime.engine.get_num_unfinished_requests())


async def until_empty(worker: VLLMWorker) -> None:
    """Wait until the engine has no request."""
    async with asyncio.timeout(10):
        while unfinished(worker):
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("streams", [48, 256])
async def test_all_streams_of_a_client_share_a_message(
    fabric_of_one: tuple[Fabric, AsyncClient, VLLMWorker], monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    made, client, worker = fabric_of_one
    await client.generate("tiny", "Hello", max_new_tokens=1)
    links = made.services["w0"]._links
    assert links is not None
    link = next(iter(links._all.values())).driver
    assert link is not None
    send_all, sent = link.send_all, []

    def counted(messages: list[tuple[bytes, bytes]]) -> None:
        sent.extend(messages)
        send_all(messages)

    monkeypatch.setattr(link, "send_all", counted)
    before = worker.load_report().progress or 0
    completions = await asyncio.gather(
        *(
            client.generate("tiny", f"prompt {n}", max_new_tokens=50, temperature=0, ignore_eos=True)
            for n in range(streams)
        )
    )
    steps = (worker.load_report().progress or 0) - before
    assert all(len(completion.token_ids) == 50 for completion in completions)
    # Beats and credit are messages, too.
    assert len(sent) <= steps + 5
    assert len(sent) < streams * 50 / 10


async def test_choices_logprobs_and_aliases_arrive_whole(fabric_of_one: tuple[Fabric, AsyncClient, VLLMWorker]) -> None:
    _, client, _ = fabric_of_one
    completion = await client.generate(
        "alias", "Hello", n=2, seed=1, logprobs=2, prompt_logprobs=0, max_new_tokens=7, ignore_eos=True
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert [entry.token.token_id for entry in choice.logprobs] == choice.token_ids
        assert all(len(entry.top) == 2 for entry in choice.logprobs)
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == completion.usage.prompt_tokens == 5
    assert completion.usage.completion_tokens == 14


@pytest.mark.parametrize("sampling", [{"typical_p": 0.5}, {"best_of": 3}, {"use_beam_search": True}], ids=str)
async def test_what_vllm_lacks_is_refused_by_name(
    fabric_of_one: tuple[Fabric, AsyncClient, VLLMWorker], sampling: dict[str, Any]
) -> None:
    _, client, _ = fabric_of_one
    with pytest.raises(UnsupportedParameterError, match=next(iter(sampling))):
        await client.generate("tiny", "x", **sampling)


async def test_whatever_ends_a_request_ends_it_in_the_engine(
    fabric_of_one: tuple[Fabric, AsyncClient, VLLMWorker],
) -> None:
    made, client, worker = fabric_of_one
    with pytest.raises(DeadlineExceededError):
        await client.generate("tiny", "Hello", deadline_ms=50, **LONG)
    await until_empty(worker)
    stream = client.stream("tiny", "Hello", **LONG)
    await anext(stream)
    assert unfinished(worker) == 1
    await stream.aclose()
    await until_empty(worker)
    async with AsyncClient(made.endpoint) as other:
        streams = [other.stream("tiny", f"{n}", **LONG) for n in range(20)]
        for one in streams:
            await anext(one)
        assert unfinished(worker) > 10
    await until_empty(worker)


async def test_beats_reach_operators(fabric_of_one: tuple[Fabric, AsyncClient, VLLMWorker]) -> None:
    _, client, _ = fabric_of_one
    await client.generate("tiny", "Hello", max_new_tokens=5)
    async with asyncio.timeout(10):
        while True:
            (seen,) = await client.workers()
            if "kv_cache_use" in str(seen):
                break
            await asyncio.sleep(0.05)
    assert "prefix_cache_hits" in str(seen)


async def start_victim(made: Fabric, model: Path, directory: Path) -> tuple[Process, psutil.Process]:
    """A worker process, and its engine's process."""
    process = await Process.start(
        "zfabric.cli.worker", "--endpoint", made.endpoint, "--name", "victim", "--backend", "vllm", "--model", str(model),
        "--model-names", "tiny", *TINY, directory=directory,
    )  # fmt: skip
    assert await process.ready() == "ready worker=victim models=tiny"
    children = psutil.Process(process.process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in child.name()]
    return process, core


async def test_a_dead_engine_is_noticed_at_once(served: Served, vllm_llama: Path, tmp_path: Path) -> None:
    """Its streams go on at another worker, or fail typed where there is none; its process ends and says why."""
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with (
            fabric(f"ipc://{directory}/c.sock") as made,
            AsyncClient(made.endpoint) as client,
            processes(tmp_path) as children,
        ):
            process, core = await start_victim(made, vllm_llama, tmp_path)
            children.append(process)
            lonely = client.stream("tiny", "Nobody else", resume="never", **LONG)
            streams = [client.stream("tiny", f"Once {n}", **LONG) for n in range(4)]
            for stream in (lonely, *streams):
                await anext(stream)
            await made.add_worker("heir", Borrowed(served[0]))
            core.kill()
            async with asyncio.timeout(5):
                with pytest.raises(WorkerLostError, match="engine died"):
                    async for _ in lonely:
                        pass
            assert await process.ended() != 0
            assert "vllm's engine has died" in process.log.read_text()
            for number, stream in enumerate(streams):
                async for _ in stream:
                    pass
                undisturbed = await client.generate("tiny", f"Once {number}", **LONG)
                assert stream.worker == "heir"
                assert stream.text == undisturbed.text
                assert stream.usage is not None
                assert stream.usage.completion_tokens == 480
