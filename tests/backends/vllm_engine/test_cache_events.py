"""What the controller knows of an engine's prefix cache is what the engine has."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.backends.told import Told
from tests.backends.vllm_engine.conftest import TINY
from tests.fabric import Fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.vllm_engine.arguments import parse
from zfabric.backends.vllm_engine.compat import cache_events
from zfabric.backends.vllm_engine.compat.cache_events import CacheEvents
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.errors import ConfigurationError

pytestmark = pytest.mark.asyncio(loop_scope="package")

#: Blocks of the engine, of 32 tokens: prompts of ten of them throw each other out.
BLOCKS = 24
#: Events of the worker's log.
LOGGED: list[str] = []


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
            await made.add_worker("w0", worker, log=lambda event, **_: LOGGED.append(event))
            yield made, client, worker


@pytest.fixture
def told(telling: tuple[Fabric, AsyncClient, VLLMWorker], monkeypatch: pytest.MonkeyPatch) -> Told:
    made, client, _ = telling
    return Told(monkeypatch, made, client, "tiny", 32)


async def test_what_is_believed_is_what_the_engine_finds(told: Told) -> None:
    await told.compare()


async def test_a_cleared_cache_is_known_to_be_empty(
    telling: tuple[Fabric, AsyncClient, VLLMWorker], told: Told
) -> None:
    _, _, worker = telling
    await told.ask(told.prompt(30, 4))
    await told.settle(60)
    assert told.believed(told.prompt(30, 4)) == 4 * 32
    assert worker._runtime is not None
    assert await worker._runtime.engine.reset_prefix_cache()
    await told.settle(61)
    assert any(item.whole for item in told.heard)
    assert told.believed(told.prompt(30, 4)) == 0


async def test_events_that_cannot_be_read_leave_nothing_believed(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last with this engine: it tells nothing any more."""
    await told.ask(told.prompt(70, 4))
    await told.settle(80)
    assert told.believed(told.prompt(70, 4)) == 4 * 32
    monkeypatch.setattr(cache_events, "_take", lambda *_: 1 // 0)
    await told.ask(told.prompt(71, 4))
    async with asyncio.timeout(60):
        while told.believed(told.prompt(70, 4)) or "cache_events_lost" not in LOGGED:
            await asyncio.sleep(0.01)


async def test_an_engine_tells_one_listener(vllm_llama: Path) -> None:
    common = ["--model", str(vllm_llama), "--tell-cache", *TINY]
    elsewhere = parse([*common, "--kv-events-config", '{"enable_kv_cache_events": true}'], {})
    with pytest.raises(ConfigurationError, match="both given"):
        CacheEvents(elsewhere.engine)
    uncached = parse([*common, "--no-enable-prefix-caching"], {})
    with pytest.raises(ConfigurationError, match="leaves nothing to tell"):
        CacheEvents(uncached.engine)
    several = parse([*common, "--data-parallel-size", "2"], {})
    with pytest.raises(ConfigurationError, match="2 data-parallel ranks"):
        CacheEvents(several.engine)
