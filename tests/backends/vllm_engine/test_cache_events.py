"""What the controller knows of an engine's prefix cache is what the engine has."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.backends.vllm_engine.conftest import TINY
from tests.fabric import Fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.vllm_engine.arguments import parse
from zfabric.backends.vllm_engine.compat.cache_events import CacheEvents
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.core.controller.placement import Placement
from zfabric.core.controller.prefixes import hashes_of
from zfabric.errors import ConfigurationError
from zfabric.limits import PREFIX_HASH_BYTES
from zfabric.wire.load import CachedBlocks
from zfabric.wire.prefixes import token_hashes

pytestmark = pytest.mark.asyncio(loop_scope="package")

#: Blocks of the engine, of 32 tokens: prompts of ten of them throw each other out.
BLOCKS = 24
GREEDY: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0, "prefix_hints": True}


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def telling(vllm_llama: Path) -> AsyncIterator[tuple[Fabric, AsyncClient, VLLMWorker]]:
    """A fabric with an engine that has a small cache, and tells of it."""
    small = ["--tell-cache", "--num-gpu-blocks-override", str(BLOCKS)]
    worker = VLLMWorker(["--model", str(vllm_llama), "--model-names", "tiny", *small, *TINY])
    with tempfile.TemporaryDirectory(prefix="zf-") as directory:
        async with (
            fabric(f"ipc://{directory}/c.sock", policy="prefix_aware") as made,
            AsyncClient(made.endpoint) as client,
        ):
            await made.add_worker("w0", worker)
            yield made, client, worker


def prompt(number: int, blocks: int) -> list[int]:
    return [3 + number] * (32 * blocks)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[CachedBlocks]:
    """What the controller was told of caches, as it comes."""
    heard: list[CachedBlocks] = []
    take = Placement.told

    def noting(self: Placement, hosts: Any, changes: Any) -> None:
        take(self, hosts, changes)
        heard.extend(changes)

    monkeypatch.setattr(Placement, "told", noting)
    return heard


def of_controller(made: Fabric, tokens: list[int]) -> int:
    """How many blocks of a prompt the controller believes to be cached."""
    index = made.controller.broker.registry.placement.index
    return max(index.matched(hashes_of(token_hashes(tokens))).values(), default=0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def all_told(client: AsyncClient, told: list[CachedBlocks], number: int) -> None:
    """Wait until the controller knows of all that has happened: what a short prompt stores now is told after it."""
    tokens = prompt(number, 1)
    await client.generate("tiny", prompt_token_ids=[*tokens, 1], **GREEDY)
    first = token_hashes(tokens)[:PREFIX_HASH_BYTES]
    await until(lambda: any(first in item.stored for item in told))


async def test_what_is_believed_is_what_the_engine_finds(
    telling: tuple[Fabric, AsyncClient, VLLMWorker], told: list[CachedBlocks]
) -> None:
    """Also of prompts that were thrown out in part or whole since they were computed."""
    made, client, _ = telling
    found = set()
    for turn, number in enumerate((0, 1, 2, 0, 3, 3, 1, 2, 0)):
        tokens = prompt(number, 10)
        believed = of_controller(made, tokens)
        answer = await client.generate("tiny", prompt_token_ids=[*tokens, 1], **GREEDY)
        assert answer.usage is not None
        # An engine's block is two of the fabric's.
        assert answer.usage.cached_tokens == 32 * (believed // 2)
        found.add(believed)
        await all_told(client, told, 40 + turn)
    assert {0, 20} <= found


async def test_a_cleared_cache_is_known_to_be_empty(
    telling: tuple[Fabric, AsyncClient, VLLMWorker], told: list[CachedBlocks]
) -> None:
    made, client, worker = telling
    await client.generate("tiny", prompt_token_ids=prompt(30, 4), **GREEDY)
    await all_told(client, told, 60)
    assert of_controller(made, prompt(30, 4)) == 8
    assert worker._runtime is not None
    assert await worker._runtime.engine.reset_prefix_cache()
    await all_told(client, told, 61)
    assert any(item.whole for item in told)
    assert of_controller(made, prompt(30, 4)) == 0


async def test_an_engine_tells_one_listener(vllm_llama: Path) -> None:
    common = ["--model", str(vllm_llama), "--tell-cache", *TINY]
    elsewhere = parse([*common, "--kv-events-config", '{"enable_kv_cache_events": true}'], {})
    with pytest.raises(ConfigurationError, match="both given"):
        CacheEvents(elsewhere.engine)
    several = parse([*common, "--data-parallel-size", "2"], {})
    with pytest.raises(ConfigurationError, match="2 data-parallel ranks"):
        CacheEvents(several.engine)
