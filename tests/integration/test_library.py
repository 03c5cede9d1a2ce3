"""Every call of the library against a real controller and a real worker."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from tests.fabric import at_rest, echo_fabric, fabric, words
from zfabric import AsyncClient, BaseModelWorker, Client, Delta, GenerateRequest, ModelInfo
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import (
    BackendError,
    ClosedError,
    ConnectionLostError,
    DeadlineExceededError,
    FabricError,
    NoWorkerError,
    ParameterRangeError,
    RequestCancelledError,
    RequestError,
    UnknownModelError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.limits import WINDOW_UNITS
from zfabric.wire.payloads import CountRequest

SLOW = EchoOptions(tokens_per_second=200)


async def test_a_stream_and_what_it_knows(endpoint: str) -> None:
    async with echo_fabric(endpoint) as (_, client):
        stream = client.stream("echo", "hello world", max_new_tokens=5)
        deltas = [delta async for delta in stream]
        assert "".join(delta.text for delta in deltas) == words("hello world", 5) == stream.text
        assert [token for delta in deltas for token in delta.token_ids] == [0, 1, 0, 1, 0]
        assert deltas[-1].finish_reason == "length" == stream.finish_reason
        assert stream.usage is not None
        assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.total_tokens) == (2, 5, 7)
        assert stream.worker == "w0"
        assert stream.request_id


async def test_every_other_call(endpoint: str) -> None:
    async with echo_fabric(endpoint) as (_, client):
        completion = await client.generate("echo", "a b", max_new_tokens=3)
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("a b a ", [0, 1, 0], "length")
        assert completion.worker == "w0"
        chat = await client.generate("echo", messages=[{"role": "user", "content": "x y"}], max_new_tokens=2)
        assert chat.text == "x y "
        tokens = await client.generate("echo", prompt_token_ids=[5, 6], max_new_tokens=2)
        assert tokens.text == "5 6 "
        vectors = await client.embed("echo", ["one", "two", "one"])
        assert vectors.shape == (3, 8)
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors[0], vectors[2])
        assert (await client.embed("echo", "one", dimensions=4)).shape == (1, 4)
        assert await client.count_tokens("echo", "a b c") == 3
        assert [model.name for model in await client.models()] == ["echo"]
        assert [model.name for model in await client.models("embedding")] == ["echo"]
        assert await client.models("multimodal") == []
        details = await client.model_details("echo")
        assert details.context_length == 1_000_000
        assert [worker.name for worker in await client.workers()] == ["w0"]
        assert await client.refresh() == ["w0"]
        status = await client.status()
        assert (status.workers, status.clients, status.completed) == (1, 1, 6)


def test_the_blocking_client_from_several_threads(ipc: str) -> None:
    """The fabric runs on a loop in another thread, as it would in another process."""
    started, stop = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        async with fabric(ipc) as made:
            await made.add_worker("w0")
            found.append(made.endpoint)
            started.set()
            await asyncio.to_thread(stop.wait)

    server = threading.Thread(target=lambda: asyncio.run(serve()))
    server.start()
    started.wait()
    results: dict[int, str] = {}

    def use(client: Client, number: int) -> None:
        for _ in range(5):
            results[number] = "".join(delta.text for delta in client.stream("echo", f"t{number} x", max_new_tokens=40))

    try:
        with Client(found[0]) as client:
            threads = [threading.Thread(target=use, args=(client, number)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == {number: words(f"t{number} x", 40) for number in range(6)}
            assert client.generate("echo", "a", max_new_tokens=3000).text == "a " * 3000
            assert client.embed("echo", ["x"]).shape == (1, 8)
            assert client.count_tokens("echo", "a b") == 2
            assert client.models()[0].name == client.model_details("echo").name == "echo"
            assert client.workers()[0].name == "w0"
            assert client.status().workers == 1
            with client.stream("echo", "a", max_new_tokens=None) as stream:
                next(stream)
            with pytest.raises(UnknownModelError):
                client.generate("nope", "a")
            child = os.fork()
            if not child:
                try:
                    client.generate("echo", "a")
                except ClosedError as error:
                    os._exit(0 if "after a fork" in str(error) else 2)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert client.generate("echo", "b", max_new_tokens=1).text == "b "
        with pytest.raises(ClosedError):
            client.generate("echo", "a")
    finally:
        stop.set()
        server.join()


async def test_two_hundred_streams_keep_every_token_in_order(endpoint: str) -> None:
    async with echo_fabric(endpoint, workers=3) as (made, client):
        prompts = [f"s{number} " + " ".join(f"{number}.{n}" for n in range(number % 7 + 1)) for number in range(200)]

        async def read(prompt: str) -> tuple[str, list[int]]:
            stream = client.stream("echo", prompt, max_new_tokens=300)
            tokens: list[int] = []
            async for delta in stream:
                tokens += delta.token_ids
            return stream.text, tokens

        results = await asyncio.gather(*(read(prompt) for prompt in prompts))
        for prompt, (text, tokens) in zip(prompts, results, strict=True):
            assert text == words(prompt, 300)
            assert tokens == [position % len(prompt.split()) for position in range(300)]
        figures = client.figures()
        assert figures["gaps"] == figures["repeated_chunks"] == figures["failovers"] == figures["rescued"] == 0
        dispatched = [worker.dispatched for worker in made.controller.broker.registry.workers.values()]
        assert max(dispatched) - min(dispatched) <= 2


async def test_a_late_reader_gets_merged_deltas_and_credit_follows(ipc: str) -> None:
    async with echo_fabric(ipc) as (_, client):
        stream = client.stream("echo", "a", max_new_tokens=1_000_000)
        first = await anext(stream)
        await asyncio.sleep(0.1)
        second = await anext(stream)
        assert len(second.token_ids) > 100
        total = len(first.token_ids) + len(second.token_ids)
        # What came without being read is at most the window.
        assert total <= 2 * WINDOW_UNITS
        while total < 20_000:
            total += len((await anext(stream)).token_ids)
        await stream.aclose()


async def test_the_terminal_brings_what_credit_held_back(ipc: str) -> None:
    async with echo_fabric(ipc) as (_, client):
        stream = client.stream("echo", "a", max_new_tokens=10_000)
        await asyncio.sleep(0.2)
        assert sum([len(delta.token_ids) async for delta in stream]) == 10_000


@pytest.mark.parametrize("how", ["cancel", "close", "with", "task", "drop"])
async def test_each_way_to_give_up_frees_the_slot(ipc: str, how: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, client):
        stream = client.stream("echo", "a", max_new_tokens=100_000)
        await anext(stream)
        if how == "cancel":
            stream.cancel()
            with pytest.raises(RequestCancelledError):
                async for _ in stream:
                    pass
        elif how == "close":
            await stream.aclose()
            assert [delta async for delta in stream] == []
        elif how == "with":
            async with stream:
                pass
        elif how == "task":
            task = asyncio.create_task(client.generate("echo", "b", max_new_tokens=100_000))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stream.aclose()
        else:
            del stream
            gc.collect()
        await at_rest(made.controller)
        assert not made.services["w0"]._sessions.streams


async def test_deadlines_while_running_and_while_queued(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", EchoWorker(SLOW), slots=1)
        running = asyncio.create_task(client.generate("echo", "a", max_new_tokens=100_000, deadline_ms=150))
        await asyncio.sleep(0.02)
        queued = asyncio.create_task(client.generate("echo", "b", max_new_tokens=1, deadline_ms=50))
        for task, state in ((queued, "QUEUED"), (running, "RUNNING")):
            with pytest.raises(DeadlineExceededError) as caught:
                await task
            assert caught.value.details["state"] == state
        assert (await client.generate("echo", "c", max_new_tokens=1)).text == "c "


async def test_priority_goes_first_and_clients_take_turns(ipc: str) -> None:
    order: list[str] = []

    class Noting(EchoWorker):
        def begin(self, request: GenerateRequest) -> None:
            order.append(request.prompt or "")
            super().begin(request)

    async with fabric(ipc) as made, AsyncClient(made.endpoint) as one, AsyncClient(made.endpoint) as two:
        await made.add_worker("w0", Noting(EchoOptions(tokens_per_second=100)), slots=1)
        await two.status()
        first = asyncio.create_task(one.generate("echo", "blocker", max_new_tokens=5))
        await asyncio.sleep(0.02)
        many = [asyncio.create_task(one.generate("echo", f"one-{n}", max_new_tokens=1)) for n in range(4)]
        await one.status()
        late = [asyncio.create_task(two.generate("echo", f"two-{n}", max_new_tokens=1)) for n in range(2)]
        await two.status()
        urgent = asyncio.create_task(one.generate("echo", "urgent", max_new_tokens=1, priority=-1))
        await asyncio.gather(first, *many, *late, urgent)
    assert order == ["blocker", "urgent", "one-0", "two-0", "one-1", "two-1", "one-2", "one-3"]


async def test_bad_requests_are_refused_with_names_and_numbers(ipc: str) -> None:
    async with echo_fabric(ipc) as (made, client):
        cases: list[tuple[type[FabricError], dict[str, Any]]] = [
            (UnknownModelError, {"model": "nope", "prompt": "x"}),
            (UnsupportedParameterError, {"model": "echo", "prompt": "x", "top_k": 5}),
            (UnsupportedParameterError, {"model": "echo", "prompt": "x", "no_such_thing": 5}),
            (ParameterRangeError, {"model": "echo", "prompt": "x", "temperature": -1}),
            (ParameterRangeError, {"model": "echo", "prompt": "x", "top_p": 0}),
            (RequestError, {"model": "echo"}),
            (RequestError, {"model": "echo", "prompt": "x", "prompt_token_ids": [1]}),
            (RequestError, {"model": "echo", "prompt": ""}),
            (RequestError, {"model": "echo", "prompt": "x", "temperature": "hot"}),
        ]
        for kind, arguments in cases:
            with pytest.raises(kind) as caught:
                await client.generate(**arguments)
            assert not caught.value.retryable
        with pytest.raises(UnknownModelError):
            await client.model_details("nope")
        with pytest.raises(NoWorkerError):
            await client.drain_worker("nobody")
        with pytest.raises(UnsupportedOperationError, match="no call"):
            await client.operate("w0", "explode")
        with pytest.raises(NoWorkerError):
            await client.operate("nobody", "explode")
        await at_rest(made.controller)


async def test_no_controller_is_an_error_that_says_so(run_directory: Any) -> None:
    async with AsyncClient(f"ipc://{run_directory}/nobody.sock", connect_timeout_ms=100) as client:
        with pytest.raises(ConnectionLostError, match="no controller answers"):
            await client.generate("echo", "x")
        with pytest.raises(ConnectionLostError):
            await client.status()


async def test_closing_the_client_ends_its_requests(ipc: str) -> None:
    async with fabric(ipc) as made:
        await made.add_worker("w0", EchoWorker(SLOW))
        client = AsyncClient(made.endpoint)
        client.open()
        waiting = asyncio.create_task(client.generate("echo", "a", max_new_tokens=100_000))
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(ClosedError):
            await waiting
        await at_rest(made.controller)


class Reverser(BaseModelWorker):
    """The README's backend."""

    parameters = frozenset({"max_new_tokens"})

    async def load(self) -> ModelInfo:
        return ModelInfo(name="reverser", aliases=["backwards"], capabilities=["generate", "count_tokens"])

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        words = (request.prompt or "").split()[::-1]
        if words[0] == "crash":
            raise ValueError("as asked")
        for number, word in enumerate(words, start=1):
            await asyncio.sleep(0)
            yield Delta(text=word + " ", token_ids=[number], finish_reason="stop" if number == len(words) else None)

    async def count_tokens(self, request: CountRequest) -> int:
        return len((request.prompt or "").split())


async def test_a_backend_of_twenty_lines(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", Reverser(), EchoWorker(EchoOptions(model_names=("echo", "again"))))
        completion = await client.generate("backwards", "one two three")
        assert completion.text == "three two one "
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 3)
        with pytest.raises(BackendError, match="as asked"):
            await client.generate("reverser", "crash")
        assert (await client.generate("again", "x", max_new_tokens=1)).text == "x "
        with pytest.raises(UnsupportedOperationError):
            await client.embed("reverser", ["x"])
        assert sorted(model.name for model in await client.models()) == ["echo", "reverser"]


async def test_a_stream_interval_gathers_tokens_but_never_the_first(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", EchoWorker(EchoOptions(tokens_per_second=400)), stream_interval=8)
        sizes = [len(delta.token_ids) async for delta in client.stream("echo", "a", max_new_tokens=40)]
        assert sizes[0] == 1
        assert sum(sizes) == 40
        assert all(size >= 8 for size in sizes[1:-1])


async def test_a_static_worker_is_not_removed_for_silence(ipc: str) -> None:
    async with fabric(ipc, beat_ms=20, lease_ms=60) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("static", beats=False)
        await made.add_worker("beating", EchoWorker(EchoOptions(model_names=("other",))))
        await asyncio.sleep(0.3)
        rows = {worker.name: worker for worker in await client.workers()}
        assert set(rows) == {"static", "beating"}
        assert rows["static"].silence_ms > 200
        assert not rows["static"].beats
        assert (await client.generate("echo", "a", max_new_tokens=1)).text == "a "
