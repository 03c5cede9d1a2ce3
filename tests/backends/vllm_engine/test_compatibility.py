"""docs/gateway-compatibility.md: every difference between the gateway and vLLM's own server, as they answer now."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from tests.backends.vllm_engine.conftest import Borrowed
from tests.compatibility.page import PAGE, compared, idle, rendered, unexplained
from tests.gateway.conftest import gateway
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.backends.vllm_engine.worker import VLLMWorker

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_the_page_has_every_difference(
    tiny_engine: VLLMWorker, openai_server: str, embeddings_server: str, minilm: Path
) -> None:
    options = TransformersOptions(model=str(minilm), model_names=("minilm",), dtype="float32", device="cpu", threads=1)
    async with (
        gateway(Borrowed(tiny_engine), ModelWorker(options)) as served,
        httpx2.AsyncClient(trust_env=False, timeout=60) as client,
    ):
        found = await compared(client, openai_server, embeddings_server, served.url)
    assert unexplained(found) == []
    assert idle(found) == []
    assert rendered(found) == PAGE.read_text(), "write it anew: python -m tests.compatibility"
