"""Streams that move between an hf-api worker and a transformers worker of the same model, as processes that are killed."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from tests.fabric import Fabric, Process, fabric, processes
from zfabric import AsyncClient, TokenStream
from zfabric.errors import BackendError, WorkerLostError
from zfabric.wire.payloads import Usage

pytestmark = pytest.mark.asyncio(loop_scope="package")

#: Only visible ASCII: of bytes that make no characters, two engines show another number of replacements.
ASCII = {token: -100.0 for token in range(259) if not 3 <= token < 97}
LONG: dict[str, Any] = {"max_new_tokens": 400, "ignore_eos": True, "logit_bias": ASCII}
GREEDY: dict[str, Any] = {**LONG, "temperature": 0}
STREAMS = 12
#: So that neither worker takes all streams.
FEW = ("--slots", "8")


@dataclass
class Pair:
    """A fabric, and what to start its workers with."""

    fabric: Fabric
    client: AsyncClient
    directory: Path
    arguments: dict[str, tuple[str, ...]]
    children: dict[str, Process] = field(default_factory=dict)

    async def start(self, *names: str) -> None:
        """Start these workers, and wait until requests can be sent to them."""
        for name in names:
            arguments = ("--endpoint", self.fabric.endpoint, "--name", name, "--log-level", "error", *FEW)
            self.children[name] = await Process.start(
                "zfabric.cli.worker", *self.arguments[name], *arguments, directory=self.directory
            )
        for name in names:
            await self.children[name].ready()

    async def kill(self, name: str) -> None:
        """Kill a worker, and wait until the controller knows."""
        self.children[name].kill()
        async with asyncio.timeout(10):
            while name in self.fabric.controller.broker.registry.workers:
                await asyncio.sleep(0.005)


@pytest_asyncio.fixture(loop_scope="package")
async def pair(models_file: Path, vllm_llama: Path) -> AsyncIterator[Pair]:
    own = ("--backend", "transformers", "--model", str(vllm_llama), "--dtype", "float32", "--device", "cpu")
    arguments: dict[str, tuple[str, ...]] = {"api": ("--backend", "hf-api", "--models", str(models_file))}
    arguments |= {name: (*own, "--threads", "1", "--model-names", name) for name in ("plain", "chat", "openai")}
    with tempfile.TemporaryDirectory(prefix="zf-") as short:
        async with fabric(f"ipc://{short}/c.sock") as made, processes(Path(short)) as children:
            async with AsyncClient(made.endpoint) as client:
                pair = Pair(made, client, Path(short), arguments)
                yield pair
            children += pair.children.values()


class Reader:
    """A stream that is read to its end, and what came."""

    def __init__(self, stream: TokenStream) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.begun = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for delta in self.stream:
                self.tokens += delta.token_ids
                if len(self.stream.text) > 5:
                    self.begun.set()
        finally:
            self.begun.set()


async def cut(pair: Pair, name: str, readers: list[Reader]) -> tuple[list[Reader], list[BaseException | None]]:
    """Kill a worker as soon as a stream of its has begun, since one of two may be done before the other begins.

    Returns the streams that it had begun, and how each of them ended.
    """

    def begun() -> list[Reader]:
        cases = (reader for reader in readers if reader.begun.is_set() and reader.stream.worker == name)
        return [reader for reader in cases if not reader.task.done()]

    async with asyncio.timeout(60):
        for beginning in asyncio.as_completed([reader.begun.wait() for reader in readers]):
            await beginning
            if begun():
                break
        affected = begun()
        await pair.kill(name)
        await asyncio.wait([reader.task for reader in readers])
    return affected, [reader.task.exception() for reader in affected]


def counts(usage: Usage | None) -> Usage | None:
    """What was counted, but for what of it was cached, which is another matter at each worker and each time."""
    return usage and structs.replace(usage, cached_tokens=0)


def prompts(model: str) -> list[dict[str, Any]]:
    if model == "plain":
        return [{"prompt": f"prompt {number}"} for number in range(STREAMS)]
    return [{"messages": [{"role": "user", "content": f"prompt {number}"}]} for number in range(STREAMS)]


@pytest.mark.parametrize("model", ["plain", "chat"])
async def test_streams_go_on_at_the_other_worker(pair: Pair, model: str) -> None:
    """Each worker has the name of its model, but for the hf-api worker, which has all."""
    await pair.start("api", model)
    for victim, other in (("api", model), (model, "api")):
        whole = await asyncio.gather(*(pair.client.generate(model, **prompt, **GREEDY) for prompt in prompts(model)))
        assert {completion.worker for completion in whole} == {"api", model}
        before = pair.client.figures()["failovers"]
        readers = [Reader(pair.client.stream(model, **prompt, **GREEDY)) for prompt in prompts(model)]
        affected, ends = await cut(pair, victim, readers)
        assert affected
        assert ends == [None] * len(affected)
        assert {reader.stream.worker for reader in affected} == {other}
        assert [reader.stream.text for reader in readers] == [completion.text for completion in whole]
        assert [reader.tokens for reader in readers] == [completion.token_ids for completion in whole]
        assert [counts(reader.stream.usage) for reader in readers] == [counts(completion.usage) for completion in whole]
        assert pair.client.figures()["failovers"] - before >= len(affected)
        if victim == "api":
            await pair.start(victim)


async def test_a_seeded_stream_of_another_engine_ends_with_an_error(pair: Pair) -> None:
    await pair.start("api", "plain")
    asked = enumerate(prompts("plain"))
    readers = [Reader(pair.client.stream("plain", **prompt, **LONG, seed=number)) for number, prompt in asked]
    affected, ends = await cut(pair, "plain", readers)
    assert affected
    assert {type(end) for end in ends} == {BackendError}
    assert "drawn again" in str(ends[0])


async def test_a_stream_without_tokens_ends_with_an_error(pair: Pair) -> None:
    """The server is not known to tell any, so nobody can go on."""
    await pair.start("api", "openai")
    options: dict[str, Any] = {"max_new_tokens": 400, "temperature": 0, "logit_bias": ASCII}
    readers = [Reader(pair.client.stream("openai", **prompt, **options)) for prompt in prompts("openai")]
    affected, ends = await cut(pair, "api", readers)
    assert affected
    assert {type(end) for end in ends} == {WorkerLostError}
    assert all(reader.stream.text for reader in affected)
