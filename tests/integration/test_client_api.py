"""What the library offers beside single streams, with each twin: whole answers, texts, choices, chats, many at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

import zfabric
from tests.fabric import Fabric, at_rest, echo_fabric, fabric, words
from zfabric import (
    AsyncClient,
    BaseModelWorker,
    BlockingBatch,
    BlockingStream,
    ChatMessage,
    Client,
    Completion,
    CompletionBatch,
    DeadlineExceededError,
    Delta,
    FabricError,
    GenerateRequest,
    ModelInfo,
    ParameterRangeError,
    RequestCancelledError,
    RequestError,
    TokenStream,
    UnknownModelError,
    UnsupportedParameterError,
)
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.client.queries import AsyncQueries

SLOW = EchoOptions(tokens_per_second=200)


class Chorus(BaseModelWorker):
    """Says each word once for each choice; the word `fail` ends it, a number of milliseconds is a pause before it."""

    parameters = frozenset({"n", "max_new_tokens", "seed"})

    def __init__(self) -> None:
        self.now = self.most = 0

    async def load(self) -> ModelInfo:
        return ModelInfo(name="chorus", capabilities=["generate", "chat"], parameters=sorted(self.parameters))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            text = request.prompt or " ".join(message["content"] for message in request.messages or [])
            said = text.split()
            for number, word in enumerate(said, start=1):
                if word == "fail":
                    raise ValueError("as asked")
                await asyncio.sleep(int(word) / 1_000 if word.isdigit() else 0)
                for index in range(request.sampling.n):
                    reason: Any = "stop" if number == len(said) else None
                    yield Delta(text=f"{word}{index} ", token_ids=[number], index=index, finish_reason=reason)
        finally:
            self.now -= 1


@contextlib.asynccontextmanager
async def chorus(endpoint: str) -> AsyncIterator[tuple[Fabric, Chorus, AsyncClient]]:
    backend = Chorus()
    async with fabric(endpoint) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", backend, slots=64)
        yield made, backend, client


async def test_a_stream_is_whole_in_four_ways(ipc: str) -> None:
    async with chorus(ipc) as (_, _, client):
        stream = client.stream("chorus", "a b c", n=2)
        assert [choice.text for choice in stream.choices] == ["", ""]
        first = await anext(stream)
        assert first.text.startswith("a")
        completion = await stream.collect()
        assert isinstance(completion, Completion)
        assert [choice.text for choice in completion.choices] == ["a0 b0 c0 ", "a1 b1 c1 "]
        assert [choice.text for choice in stream.choices] == ["a0 b0 c0 ", "a1 b1 c1 "]
        assert [choice.finish_reason for choice in completion.choices] == ["stop", "stop"]
        assert (completion.request_id, completion.worker) == (stream.request_id, "w0")
        assert (await stream.collect()).text == completion.text, "and again"

        whole = await client.stream("chorus", "a b c", n=2)
        assert whole.text == "a0 b0 c0 "
        assert [text async for text in client.stream("chorus", "a b", n=2).texts()] == ["a0 ", "b0 "]
        assert [text async for text in client.stream("chorus", "a b", n=2).texts(1)] == ["a1 ", "b1 "]
        with pytest.raises(ParameterRangeError, match="index"):
            client.stream("chorus", "a").texts(1)
        assert whole.to_dict()["choices"][1]["text"] == "a1 b1 c1 "


async def test_what_ended_a_stream_ends_its_whole_too(ipc: str) -> None:
    async with chorus(ipc) as (_, _, client):
        with pytest.raises(zfabric.BackendError, match="as asked"):
            await client.stream("chorus", "a fail")
        stream = client.stream("chorus", "a 500 b")
        await anext(stream)
        await stream.aclose()
        with pytest.raises(RequestCancelledError):
            await stream.collect()


async def test_a_chat_is_answered(ipc: str) -> None:
    messages: list[ChatMessage] = [{"role": "user", "content": "one two"}]
    async with echo_fabric(ipc) as (made, client):
        assert (await client.chat("echo", messages, max_tokens=3)).text == "one two one "
        assert (await client.chat("echo", [{"role": "user", "content": "x"}], max_new_tokens=1)).text == "x "
        for wrong in ("hello", None, [5], [{"content": "x"}], []):
            with pytest.raises(RequestError):
                await client.chat("echo", wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="prompt"):
            await client.chat("echo", messages, prompt="x")  # type: ignore[call-arg]

        def use() -> str:
            with Client(made.endpoint) as blocking:
                return blocking.chat("echo", messages, max_tokens=3).text

        assert await asyncio.to_thread(use) == "one two one "


async def test_a_timeout_in_seconds_ends_a_request(ipc: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, client):
        calls: list[Callable[[], Coroutine[Any, Any, Completion]]] = [
            lambda: client.generate("echo", "a", max_new_tokens=100_000, timeout=0.05),
            lambda: client.stream("echo", "a", max_new_tokens=100_000, timeout=0.05).collect(),
            lambda: client.chat("echo", [{"role": "user", "content": "a"}], max_new_tokens=100_000, timeout=0.05),
        ]
        for call in calls:
            with pytest.raises(DeadlineExceededError):
                await call()
        await at_rest(made.controller)
        assert (await client.embed("echo", "x", timeout=5)).shape == (1, 8)
        assert await client.count_tokens("echo", "a b", timeout=5) == 2
        assert [model.name for model in await client.models(timeout=5)] == ["echo"]


async def test_a_wait_that_times_out_leaves_the_stream_readable(ipc: str) -> None:
    async with echo_fabric(ipc, options=EchoOptions(tokens_per_second=50, first_token_ms=150)) as (_, client):
        stream = client.stream("echo", "a b", max_new_tokens=5)
        texts = client.stream("echo", "a b", max_new_tokens=5).texts()
        late = 0
        for reader in (stream, texts):
            try:
                async with asyncio.timeout(0.02):
                    await anext(reader)
            except TimeoutError:
                late += 1
        assert late == 2
        task = asyncio.create_task(stream.collect())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert "".join([delta.text async for delta in stream]) == words("a b", 5)
        assert "".join([text async for text in texts]) == words("a b", 5)


@pytest.mark.parametrize("how", ["anext", "collect", "texts"])
async def test_a_reader_that_is_cancelled_and_forgotten_leaves_nothing(ipc: str, how: str) -> None:
    async with echo_fabric(ipc, options=EchoOptions(first_token_ms=60_000)) as (made, client):

        async def read() -> None:
            stream = client.stream("echo", "a")
            if how == "texts":
                await anext(stream.texts())
            else:
                await (anext(stream) if how == "anext" else stream)

        task = asyncio.create_task(read())
        await client.status()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        gc.collect()
        await at_rest(made.controller)


async def test_two_tasks_on_one_stream_are_told_so(ipc: str) -> None:
    async with (
        echo_fabric(ipc, options=EchoOptions(first_token_ms=60_000)) as (_, client),
        client.stream("echo", "a") as stream,
    ):
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(FabricError, match="two tasks"):
            await anext(stream)
        first.cancel()


# ── many ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_come_in_order_of_completion_within_their_bound(ipc: str) -> None:
    async with chorus(ipc) as (made, backend, client):
        prompts: list[Any] = ["300", "1", "fail", "", [{"role": "user", "content": "2"}], "3"]
        found = [entry async for entry in client.generate_many("chorus", prompts, concurrency=3)]
        assert sorted(position for position, _ in found) == list(range(6))
        assert found[-1][0] == 0, "the slowest comes last"
        results = dict(found)
        assert isinstance(results[2], zfabric.BackendError)
        assert isinstance(results[3], RequestError)
        completions = {n: r.text for n, r in results.items() if isinstance(r, Completion)}
        assert completions == {0: "3000 ", 1: "10 ", 4: "20 ", 5: "30 "}
        assert backend.most <= 3
        await at_rest(made.controller)


async def test_prompts_are_taken_as_places_become_free(ipc: str) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "1"

    async with chorus(ipc) as (made, _, client):
        batch = client.generate_many("chorus", endless(), concurrency=4)
        assert taken == 4
        for _ in range(10):
            await anext(batch)
        assert taken <= 14
        await batch.aclose()
        assert [entry async for entry in batch] == []
        await at_rest(made.controller)


async def test_a_callers_own_iterable_may_fail(ipc: str) -> None:
    def failing() -> Iterator[str]:
        yield "1"
        raise KeyError("mine")

    async with chorus(ipc) as (made, _, client):
        with pytest.raises(KeyError, match="mine"):
            client.generate_many("chorus", failing())
        gc.collect()
        await at_rest(made.controller)


@pytest.mark.parametrize("how", ["close", "with", "drop", "timeout"])
async def test_each_way_to_give_up_a_batch(ipc: str, how: str) -> None:
    async with chorus(ipc) as (made, backend, client):
        batch: CompletionBatch | None = client.generate_many("chorus", ["60000"] * 5, concurrency=5)
        assert batch is not None
        while backend.now < 5:
            await asyncio.sleep(0.001)
        if how == "close":
            await batch.aclose()
        elif how == "with":
            async with batch:
                pass
        elif how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(batch)
            assert backend.now == 5, "the wait is over, the batch is not"
        batch = None
        gc.collect()
        await at_rest(made.controller)


async def test_a_closed_client_ends_its_batches(ipc: str) -> None:
    async with chorus(ipc) as (made, _, _):
        client = AsyncClient(made.endpoint)
        client.open()
        batch = client.generate_many("chorus", ["60000"] * 5, concurrency=2)
        await client.status()
        await client.close()
        results: list[Completion | FabricError] = []

        async def read() -> None:
            async for _, result in batch:
                results.append(result)

        for _ in range(2):
            with pytest.raises(zfabric.ClosedError):
                await read()
        assert 2 <= len(results) <= 3
        assert all(isinstance(result, zfabric.ClosedError) for result in results)
        with pytest.raises(zfabric.ClosedError):
            client.generate_many("chorus", ["1"])
        await at_rest(made.controller)


# ── the blocking twins ────────────────────────────────────────────────────────────────────────────────────────────────


async def blocking(endpoint: str, use: Callable[[Client], None]) -> None:
    """Use a blocking client in a thread, beside a fabric on this loop."""

    def run() -> None:
        with Client(endpoint) as client:
            use(client)

    await asyncio.to_thread(run)


async def test_the_blocking_client_offers_the_same(ipc: str) -> None:
    def use(client: Client) -> None:
        stream = client.stream("chorus", "a b c", n=2)
        next(stream)
        completion = stream.collect()
        assert [choice.text for choice in completion.choices] == ["a0 b0 c0 ", "a1 b1 c1 "]
        assert [choice.text for choice in stream.choices] == [choice.text for choice in completion.choices]
        assert list(client.stream("chorus", "a b", n=2).texts(1)) == ["a1 ", "b1 "]
        found = list(client.generate_many("chorus", ["300", "1", "fail", "2"], concurrency=3))
        assert sorted(position for position, _ in found) == [0, 1, 2, 3]
        assert found[-1][0] == 0
        with client.generate_many("chorus", ["60000"] * 3, concurrency=2) as batch:
            pass
        assert list(batch) == []
        with pytest.raises(DeadlineExceededError):
            client.generate("chorus", "60000", timeout=0.05)
        with client.stream("chorus", "60000") as closed:
            pass
        with pytest.raises(RequestCancelledError):
            closed.collect()
        assert client.models(timeout=5)[0].name == "chorus"
        assert client.figures()["failovers"] == 0
        with pytest.raises(UnsupportedParameterError, match="'no_such'"):
            client.embed("chorus", "x", no_such=1)  # type: ignore[call-arg]

    async with chorus(ipc) as (made, _, _):
        await blocking(made.endpoint, use)
        await at_rest(made.controller)


async def test_closing_wakes_every_thread_that_waits(ipc: str) -> None:
    errors: list[FabricError] = []

    def caught(call: Callable[[], Any]) -> None:
        try:
            call()
        except FabricError as error:
            errors.append(error)

    def use(client: Client) -> None:
        stream = client.stream("chorus", "60000")
        batch = client.generate_many("chorus", ["60000"] * 3, concurrency=2)
        calls: list[Callable[[], Any]] = [
            lambda: next(stream),
            lambda: client.generate("chorus", "60000"),
            lambda: [result for _, result in batch],
        ]
        threads = [threading.Thread(target=caught, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        while client.status().in_flight < 4:
            pass
        client.close()
        for thread in threads:
            thread.join()
        for call in (lambda: client.generate("chorus", "a"), lambda: client.stream("chorus", "a"), lambda: list(batch)):
            caught(call)

    async with chorus(ipc) as (made, _, _):
        await blocking(made.endpoint, use)
        assert len(errors) == 6
        assert all(isinstance(error, zfabric.ClosedError) for error in errors)
        await at_rest(made.controller)


async def test_unknown_models_are_results_of_a_batch(ipc: str) -> None:
    async with chorus(ipc) as (_, _, client):
        results = [result async for _, result in client.generate_many("nope", ["a", "b"])]
        assert all(isinstance(result, UnknownModelError) for result in results)
        assert len(results) == 2


def test_both_clients_have_the_same_calls_with_an_example_each() -> None:
    for one, other in ((AsyncClient, Client), (TokenStream, BlockingStream), (CompletionBatch, BlockingBatch)):
        calls = {name for name in dir(one) if not name.startswith("_")}
        twins = {name for name in dir(other) if not name.startswith("_")}
        assert {name.replace("aclose", "close") for name in calls} ^ twins <= {"open", "endpoint", "reader"}, (
            "threads wait for one stream each"
        )
        for name in calls & twins:
            first, second = getattr(one, name), getattr(other, name)
            if inspect.isfunction(first):
                parameters = [list(inspect.signature(call).parameters.values()) for call in (first, second)]
                assert parameters[0] == parameters[1], name
    for kind in (AsyncClient, Client):
        for name, call in vars(kind).items():
            if inspect.isfunction(call) and not name.startswith("_") and name not in ("open", "close", "figures"):
                assert "Example:" in (call.__doc__ or ""), name
    for name, call in vars(AsyncQueries).items():
        assert name.startswith("_") or "Example:" in (call.__doc__ or ""), name


def test_every_error_is_at_the_top() -> None:
    assert issubclass(zfabric.WorkerLostError, zfabric.UnavailableError)
    assert issubclass(zfabric.UnavailableError, zfabric.FabricError)


async def test_an_embedding_of_another_shape_is_refused(ipc: str) -> None:
    class Short(EchoWorker):
        async def embed(self, request: Any) -> Any:
            result = await super().embed(request)
            result.rows -= 1
            result.data = result.data[: 4 * result.rows * result.dimensions]
            return result

    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", Short())
        with pytest.raises(zfabric.ProtocolError, match="2 vectors came for 3 inputs"):
            await client.embed("echo", ["a", "b", "c"])
