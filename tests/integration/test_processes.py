"""The commands as real processes: ready, serve, drain, and the real model from end to end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path

import pytest

from tests.fabric import Process, processes, words
from zfabric import AsyncClient, Completion
from zfabric.errors import UnavailableError
from zfabric.models.wheels import prepare

ROOT = Path(__file__).resolve().parents[2]
CONTROLLER, WORKER = "zfabric.cli.controller", "zfabric.cli.worker"


def endpoint_of(ready: str) -> str:
    return ready.partition("endpoint=")[2]


async def command(*arguments: str, endpoint: str) -> tuple[int, str, str]:
    """Run `zfabric …`. Returns its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "zfabric.cli.main",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "ZFABRIC_ENDPOINT": endpoint, "COLUMNS": "160"},
    )
    output, errors = await process.communicate()
    return process.returncode or 0, output.decode(), errors.decode()


async def test_commands_against_real_processes(endpoint: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        # Within a recovery an unknown model may still come back, and the commands would depend on how long the start took.
        controller = await Process.start(
            CONTROLLER, "--endpoint", endpoint, "--recovery-ms", "0", directory=run_directory
        )
        children.append(controller)
        endpoint = endpoint_of(await controller.ready())
        worker = await Process.start(
            WORKER, "--backend", "echo", "--name", "w1", "--endpoint", endpoint, directory=run_directory
        )
        children.append(worker)
        assert await worker.ready() == "ready worker=w1 models=echo"

        code, output, _ = await command("models", "--json", endpoint=endpoint)
        assert code == 0
        assert json.loads(output)[0]["name"] == "echo"
        code, output, _ = await command("workers", endpoint=endpoint)
        assert "w1" in output
        code, output, _ = await command("status", "--json", endpoint=endpoint)
        assert json.loads(output)["workers"] == 1
        code, output, _ = await command("generate", "echo", "hello there", "--max-new-tokens", "3", endpoint=endpoint)
        assert (code, output) == (0, "hello there hello \n")
        code, output, _ = await command("chat", "echo", "hi", "--max-new-tokens", "2", "--json", endpoint=endpoint)
        assert json.loads(output)["text"] == "hi hi "
        code, output, _ = await command("embed", "echo", "a", "b", "--json", endpoint=endpoint)
        assert [len(row) for row in json.loads(output)] == [8, 8]
        code, output, _ = await command("count", "echo", "a b c", endpoint=endpoint)
        assert output == "3\n"
        code, _, errors = await command("generate", "nope", "x", endpoint=endpoint)
        assert code == 1
        assert "error 40301" in errors
        code, _, errors = await command("models", "--nonsense", endpoint=endpoint)
        assert code == 2

        minimal = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "examples/minimal_client.py"), endpoint, "echo", "one two", "3000",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        answer, _ = await minimal.communicate()
        assert minimal.returncode == 0
        assert answer.decode() == words("one two", 3000) + "\n"

        code, output, _ = await command("drain", "w1", endpoint=endpoint)
        assert code == 0
        assert await worker.ended() == 0
        controller.kill(signal.SIGTERM)
        assert await controller.ended() == 0
        lines = [json.loads(line) for line in controller.log.read_text().splitlines()]
        assert {"listening", "draining", "drained"} <= {line["event"] for line in lines}


async def test_sigterm_lets_running_requests_finish(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        worker = await Process.start(WORKER, "--endpoint", ipc, "--tokens-per-second", "100", directory=run_directory)
        children += [controller, worker]
        await controller.ready()
        await worker.ready()
        async with AsyncClient(ipc) as client:
            stream = client.stream("echo", "a b", max_new_tokens=60)
            await anext(stream)
            worker.kill(signal.SIGTERM)
            controller.kill(signal.SIGTERM)
            async for _ in stream:
                pass
            assert stream.text == words("a b", 60)
        assert await worker.ended() == 0
        assert await controller.ended() == 0


async def test_a_drain_has_a_limit_and_hands_back(ipc: str, run_directory: Path) -> None:
    """What does not finish in time goes on at another worker; the reader sees nothing."""
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(controller)
        await controller.ready()
        common = ("--endpoint", ipc, "--drain-ms", "200", "--tokens-per-second")
        # Too slow to end by itself before the other one has started, however long that takes.
        first = await Process.start(WORKER, *common, "20", "--name", "first", directory=run_directory)
        children.append(first)
        await first.ready()
        async with AsyncClient(ipc) as client:
            stream = client.stream("echo", "a b c", max_new_tokens=2_000, temperature=0)
            await anext(stream)
            second = await Process.start(WORKER, *common, "5000", "--name", "second", directory=run_directory)
            children.append(second)
            await second.ready()
            first.kill(signal.SIGTERM)
            async for _ in stream:
                pass
            assert stream.text == words("a b c", 2_000)
            assert stream.worker == "second"
            assert stream.usage is not None
            assert stream.usage.completion_tokens == 2_000
        assert await first.ended() == 0


async def test_a_second_controller_is_refused_and_the_first_goes_on(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        first = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(first)
        await first.ready()
        second = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        assert await second.ended() == 1
        assert "in use by another controller" in second.log.read_text()
        async with AsyncClient(ipc) as client:
            assert (await client.status()).workers == 0
        assert stat.S_IMODE(run_directory.stat().st_mode) == 0o700


async def test_workers_wait_for_a_controller_that_is_late(ipc: str, run_directory: Path) -> None:
    async with processes(run_directory) as children:
        worker = await Process.start(WORKER, "--endpoint", ipc, directory=run_directory)
        children.append(worker)
        async with AsyncClient(ipc, connect_timeout_ms=60_000) as client:
            waiting = asyncio.create_task(client.generate("echo", "early", max_new_tokens=1))
            await asyncio.sleep(0.3)
            controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
            children.append(controller)
            await controller.ready()
            assert (await waiting).text == "early "
        await worker.ready()


async def test_public_endpoints_must_be_asked_for(run_directory: Path) -> None:
    refused = await Process.start(CONTROLLER, "--endpoint", "tcp://0.0.0.0:9", directory=run_directory)
    assert await refused.ended() == 2
    assert "can be reached from other hosts" in refused.log.read_text()


async def test_a_real_model_from_end_to_end(endpoint: str, run_directory: Path) -> None:
    """Chat on SmolLM2 and embeddings of MiniLM, in one worker process with two backends."""
    smollm2, minilm = prepare("smollm2"), prepare("minilm")
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", endpoint, directory=run_directory)
        children.append(controller)
        endpoint = endpoint_of(await controller.ready())
        worker = await Process.start(
            WORKER, "--endpoint", endpoint, "--name", "real", "--backend", "transformers", "--model", str(smollm2),
            "--model-names", "smollm2", "--device", "cpu", "--threads", "2", "--dtype", "float32",
            "--and", "--backend", "transformers", "--model", str(minilm), "--model-names", "minilm", "--device", "cpu",
            directory=run_directory,
        )  # fmt: skip
        children.append(worker)
        assert await worker.ready() == "ready worker=real models=smollm2,minilm"
        async with AsyncClient(endpoint) as client:
            questions = ["What is the capital of France?", "What is the capital of Italy?", "What is 2 + 2?"]

            def ask(question: str) -> Awaitable[Completion]:
                messages = [{"role": "user", "content": question}]
                return client.generate("smollm2", messages=messages, temperature=0, max_new_tokens=24)

            answers = await asyncio.gather(*(ask(question) for question in questions))
            assert "Paris" in answers[0].text
            # In one batch or alone. (bfloat16 would not do: its rounding depends on the batch.)
            assert [answer.text for answer in answers] == [(await ask(question)).text for question in questions]
            for completion in answers:
                assert completion.usage.completion_tokens == len(completion.token_ids)
                assert completion.finish_reason in ("stop", "length")
            vectors = await client.embed("minilm", ["a cat", "a kitten", "revenue"])
            assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
            assert await client.count_tokens("smollm2", "Hello world") > 1
            details = await client.model_details("smollm2")
            assert details.context_length == 8192
            seeded = [await client.generate("smollm2", "Once", seed=5, max_new_tokens=8) for _ in range(2)]
            assert seeded[0].token_ids == seeded[1].token_ids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_that_dies_in_mid_stream(ipc: str, run_directory: Path, number: signal.Signals) -> None:
    async with processes(run_directory) as children:
        controller = await Process.start(CONTROLLER, "--endpoint", ipc, directory=run_directory)
        children.append(controller)
        await controller.ready()
        paced = ("--endpoint", ipc, "--tokens-per-second", "200", "--drain-ms", "1")
        workers = {
            name: await Process.start(WORKER, *paced, "--name", name, directory=run_directory) for name in ("w1", "w2")
        }
        children += workers.values()
        for worker in workers.values():
            await worker.ready()
        async with AsyncClient(ipc) as client:
            streams = [client.stream("echo", f"s{n} x", max_new_tokens=200, temperature=0) for n in range(20)]
            drawn = client.stream("echo", "unseeded", max_new_tokens=200)
            alone = client.stream("echo", "never", max_new_tokens=2_000, resume="never")
            for stream in (*streams, drawn, alone):
                await anext(stream)
            assert {stream.worker for stream in streams} == {"w1", "w2"}
            victim = alone.worker
            assert victim is not None
            workers[victim].kill(number)
            for index, stream in enumerate(streams):
                async for _ in stream:
                    pass
                assert stream.text == words(f"s{index} x", 200)
                assert stream.usage is not None
                assert stream.usage.completion_tokens == 200
            # With the defaults an answer is drawn by a seed of the client's own, so it goes on as well.
            assert (await drawn.collect()).text == words("unseeded", 200)
            with pytest.raises(UnavailableError) as caught:
                async for _ in alone:
                    pass
            assert caught.value.retryable
            assert alone.text
            assert client.figures()["failovers"] >= 1
            assert [worker.name for worker in await client.workers()] == [name for name in workers if name != victim]
