"""Write docs/gateway-compatibility.md anew: python -m tests.compatibility. Two servers of vLLM's start in a minute or two."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import httpx2

from tests.backends.served import vllm_server
from tests.backends.tiny import save_llama
from tests.backends.vllm_engine.conftest import EMBEDDINGS_SERVER, OPENAI_SERVER, TINY
from tests.compatibility.page import PAGE, compared, idle, rendered, unexplained
from tests.gateway.conftest import gateway
from zfabric.backends.hf_transformers.options import TransformersOptions
from zfabric.backends.hf_transformers.worker import ModelWorker
from zfabric.backends.vllm_engine.worker import VLLMWorker
from zfabric.models.wheels import prepare


async def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, generating, embedding = (Path(scratch, name) for name in ("model", "generating", "embedding"))
        for directory in (model, generating, embedding):
            directory.mkdir()
        save_llama(model, heads=2)
        minilm = prepare("minilm")
        own = VLLMWorker(["--model", str(model), "--model-names", "tiny", "alias", *TINY])
        options = TransformersOptions(model=str(minilm), model_names=("minilm",), dtype="float32", device="cpu")
        async with (
            vllm_server(model, generating, *OPENAI_SERVER) as theirs,
            vllm_server(minilm, embedding, *EMBEDDINGS_SERVER) as embeddings,
            gateway(own, ModelWorker(options)) as served,
            httpx2.AsyncClient(trust_env=False, timeout=60) as client,
        ):
            found = await compared(client, theirs, embeddings, served.url)
    PAGE.write_text(rendered(found))
    for difference in unexplained(found):
        print(f"no rule is about {difference}")
    for rule in idle(found):
        print(f"nothing is any more what {rule} is about")


asyncio.run(main())
