"""Against a server that nobody here wrote: `transformers serve`, behind a real controller and a real worker."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from tests.backends.served import transformers_server
from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.errors import FabricError, UnsupportedOperationError, UnsupportedParameterError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Setup:
    """What runs, and how to reach it."""

    client: AsyncClient
    worker: Process
    url: str
    model: str
    file: Path

    def write(self, names: tuple[str, ...]) -> None:
        """The models file, with these names for the same model."""
        common = {"base_url": self.url, "model": self.model, "server": "transformers", "tokenizer": self.model}
        models = {name: {**common, "protocol": "completions" if name == "plain" else "chat"} for name in names}
        self.file.write_text(json.dumps({"models": models}))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setup(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Setup]:
    home = tmp_path_factory.mktemp("serve")
    with tempfile.TemporaryDirectory() as short:
        endpoint = f"ipc://{short}/c.sock"
        async with transformers_server(tiny_llama, home) as url, processes(Path(short)) as children:
            controller = await Process.start("zfabric.cli.controller", "--endpoint", endpoint, directory=Path(short))
            children.append(controller)
            made = Setup(AsyncClient(endpoint), controller, url, str(tiny_llama), home / "models.json")
            made.write(("chat", "plain"))
            worker_arguments = ("--backend", "hf-api", "--models", str(made.file), "--endpoint", endpoint)
            made.worker = await Process.start("zfabric.cli.worker", *worker_arguments, directory=Path(short))
            children.append(made.worker)
            await controller.ready()
            await made.worker.ready()
            async with made.client:
                yield made
            made.worker.kill(signal.SIGTERM)
            assert await made.worker.ended() == 0


async def test_text_is_what_the_server_says(setup: Setup) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": setup.model, "messages": messages, "temperature": 0.0, "max_tokens": 24}
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as direct:
        answer = (await direct.post(f"{setup.url}/chat/completions", json=body)).json()
    completion = await setup.client.generate("chat", messages=messages, temperature=0, max_new_tokens=24)
    assert completion.text == answer["choices"][0]["message"]["content"]
    assert completion.usage.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert completion.finish_reason == {"length": "length"}.get(answer["choices"][0]["finish_reason"], "stop")
    assert await setup.client.count_tokens("chat", messages=messages) == completion.usage.prompt_tokens
    assert await setup.client.count_tokens("chat", "Hello") == completion.usage.prompt_tokens


async def test_completions_and_many_at_once(setup: Setup) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    alone = [await setup.client.generate("plain", prompt, temperature=0, max_new_tokens=8) for prompt in prompts[:2]]
    together = await asyncio.gather(
        *(setup.client.generate("plain", prompt, temperature=0, max_new_tokens=8) for prompt in prompts)
    )
    assert [completion.text for completion in together[:2]] == [completion.text for completion in alone]
    assert alone[0].text


async def test_what_it_cannot_do_is_refused_by_name(setup: Setup) -> None:
    with pytest.raises(UnsupportedParameterError, match="top_k"):
        await setup.client.generate("chat", "x", top_k=5)
    with pytest.raises(UnsupportedOperationError):
        await setup.client.generate("chat", prompt_token_ids=[1, 2, 3])
    with pytest.raises(FabricError):
        await setup.client.embed("chat", ["x"])


async def test_a_hangup_reads_the_file_anew_and_drops_no_stream(setup: Setup) -> None:
    running = setup.client.stream("chat", "Once upon a time", temperature=0, max_new_tokens=300)
    first = await anext(running)
    setup.file.write_text("not json")
    setup.worker.kill(signal.SIGHUP)
    async with asyncio.timeout(20):
        while "reload_failed" not in setup.worker.log.read_text():
            await asyncio.sleep(0.01)
    setup.write(("other", "plain"))
    setup.worker.kill(signal.SIGHUP)
    async with asyncio.timeout(20):
        while True:
            try:
                await setup.client.generate("other", "x", temperature=0, max_new_tokens=2)
                break
            except FabricError:
                await asyncio.sleep(0.01)
    rest = [delta async for delta in running]
    assert first.text
    assert running.finish_reason in ("length", "stop")
    assert rest
    setup.write(("chat", "plain"))
    setup.worker.kill(signal.SIGHUP)
