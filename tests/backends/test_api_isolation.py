"""Upstreams of one hf-api worker do not touch each other, connections are used again, and tokens stay secret."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.backends.faulty import (
    EVENTS,
    Announced,
    Asked,
    api_worker,
    ask,
    chat_event,
    faulty,
    status,
    usual,
)
from tests.endpoints import ipc, run_directory
from tests.fabric import Process, fabric, processes, words
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.backends.hf_api.worker import HuggingfaceApiOptions, HuggingfaceApiWorker
from zfabric.errors import AuthenticationError, FabricError
from zfabric.wire.payloads import GenerateRequest

__all__ = ["ipc", "run_directory"]

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SECRET = "hf_averysecrettoken"


def chunked(*pieces: bytes) -> bytes:
    return CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


async def whole(asked: Asked) -> None:
    """An answer after which the connection can be used again."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    end = chat_event(usage=usage, choices=[])
    await asked.send(chunked(chat_event("fine"), chat_event(finish="stop"), end, b"data: [DONE]\n\n"))


async def test_a_slow_upstream_keeps_no_other_waiting(tmp_path: Path) -> None:
    """All places of one are taken by answers that never come; another one answers, and its embeddings as well."""
    taken = asyncio.Semaphore(0)

    async def never(asked: Asked) -> None:
        taken.release()
        await asked.gone()

    async def vectors(asked: Asked) -> None:
        body = json.dumps([[1.0, 0.0] for _ in asked.body["inputs"]]).encode()
        await asked.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with faulty(never) as slow, faulty(usual()) as fast, faulty(vectors) as embedding:
        file = tmp_path / "models.json"
        models = {"slow": {"base_url": slow.url, "slots": 8, "parallel": 1}, "m": {"base_url": fast.url}}
        models["e"] = {"base_url": embedding.url, "protocol": "feature-extraction"}
        file.write_text(json.dumps({"models": models}))
        worker = HuggingfaceApiWorker(HuggingfaceApiOptions(models=file))
        worker.steps = Announced()
        await worker.load()

        async def stuck() -> None:
            async for _ in worker.generate(GenerateRequest(prompt="x", model="slow")):
                raise AssertionError("it never answers")

        waiting = [asyncio.create_task(stuck()) for _ in range(20)]
        for _ in range(9):
            await taken.acquire()
        for _ in range(50):
            deltas = await ask(worker)
            assert "".join(delta.text for delta in deltas) == "fine"
        # No more than its slots and its parallel calls have reached the slow one, the others wait here.
        assert slow.connections == 9
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await worker.close()


async def test_connections_are_used_again(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def held(asked: Asked) -> None:
        await gate.wait()
        await whole(asked)

    async with faulty(held, keep=True) as server, api_worker(tmp_path, server.url) as worker:
        together = [asyncio.create_task(ask(worker)) for _ in range(5)]
        while len(server.asked) < 5:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*together)
        for _ in range(10):
            await ask(worker)
        await asyncio.gather(*(ask(worker) for _ in range(5)))
        assert len(server.asked) == 20
        assert server.connections == 5


async def test_a_connection_that_was_cut_off_is_not_used_again(tmp_path: Path) -> None:
    async def endless(asked: Asked) -> None:
        await asked.send(EVENTS, chat_event("one two"))
        await asked.gone()

    async with (
        faulty(whole, endless, whole, keep=True) as server,
        api_worker(tmp_path, server.url, server_stops=False) as worker,
    ):
        await ask(worker)
        assert (await ask(worker, stop=("two",)))[-1].finish_reason == "stop"
        assert (await ask(worker))[0].text == "fine"
        assert server.connections == 2


async def test_an_upstream_that_dies_in_mid_stream_hands_over(ipc: str, tmp_path: Path) -> None:
    """The worker lives on; the stream goes on at an echo worker of the same model, from the tokens that were told."""
    may_die = asyncio.Event()

    async def dying(asked: Asked) -> None:
        choices = [{"index": 0, "text": f"{word} ", "token_ids": [place]} for place, word in enumerate(("a", "b", "c"))]
        events = [b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices]
        await asked.send(EVENTS, *events)
        await may_die.wait()

    async with faulty(dying) as server, fabric(ipc) as made, AsyncClient(ipc) as client:
        keys = {"protocol": "completions", "server": "vllm", "attempts": 1}
        async with api_worker(tmp_path, server.url, **keys) as api:
            await made.add_worker("api", api)
            stream = client.stream("m", "a b c", temperature=0, max_new_tokens=9)
            assert (await anext(stream)).text.startswith("a ")
            await made.add_worker("echo", EchoWorker(EchoOptions(model_names=("m",))))
            may_die.set()
            async for _ in stream:
                pass
            assert stream.text == words("a b c", 9)
            assert stream.worker == "echo"
            assert stream.usage is not None
            assert stream.usage.completion_tokens == 9
            await made.remove_worker("api")


@pytest.mark.parametrize("where", ["body", "header", "event", "garbage"])
async def test_a_token_is_nowhere_to_be_read(ipc: str, run_directory: Path, where: str) -> None:
    """A server that hands it back, and a worker that logs all it can."""
    told = json.dumps({"error": {"message": f"Bearer {SECRET} is wrong", "code": 401}})
    script = {
        "body": status(401, told),
        "header": status(401, "no", X_Echo=SECRET, WWW_Authenticate=f"Bearer {SECRET}"),
        "event": status(200, f"data: {told}\n\n", Content_Type="text/event-stream"),
        "garbage": status(200, f"data: {{{SECRET}\n\n", Content_Type="text/event-stream"),
    }[where]
    async with faulty(script) as server, fabric(ipc) as made, processes(run_directory) as children:
        models = run_directory / "models.json"
        models.write_text(json.dumps({"models": {"m": {"base_url": server.url, "token_env": "A_TOKEN"}}}))
        arguments = ("--backend", "hf-api", "--models", str(models), "--endpoint", ipc, "--log-level", "debug")
        worker = await Process.start("zfabric.cli.worker", *arguments, directory=run_directory, A_TOKEN=SECRET)
        children.append(worker)
        await worker.ready()
        async with AsyncClient(ipc) as client:
            with pytest.raises(FabricError) as caught:
                await client.generate("m", "hi")
            status_told = repr(await client.workers()) + repr(await client.models())
        assert SECRET in server.asked[0].head
        if where in ("body", "header"):
            assert isinstance(caught.value, AuthenticationError)
        known = repr(made.controller.broker.registry.workers)
        log = worker.log.read_text()
        assert "registered" in log
        for shown in (repr(caught.value), str(caught.value.details), status_told, known, log):
            assert SECRET not in shown
