"""One reader of many streams: each has its whole answer and one end, and what befalls one is no other's affair."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from tests.fabric import at_rest, echo_fabric, fabric, words
from zfabric import (
    AnswerStream,
    AsyncClient,
    BackendError,
    BaseModelWorker,
    ClosedError,
    Delta,
    GenerateRequest,
    ModelInfo,
    RequestCancelledError,
    RequestError,
    UnknownModelError,
)
from zfabric.backends.echo import EchoOptions
from zfabric.limits import WINDOW_UNITS

SLOW = EchoOptions(tokens_per_second=200)
ENDLESS = 100_000
#: Words of more than one window.
LONG = 2 * WINDOW_UNITS


class Bursts(BaseModelWorker):
    """Says all of its words within one turn of the loop, so that they leave as one message."""

    parameters = frozenset({"n", "max_new_tokens"})

    async def load(self) -> ModelInfo:
        return ModelInfo(name="bursts", capabilities=["generate"], parameters=sorted(self.parameters))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        said = (request.prompt or "").split()
        for number, word in enumerate(said, start=1):
            if word == "fail":
                raise ValueError("as asked")
            for index in range(request.sampling.n):
                yield Delta(
                    text=f"{word} ",
                    token_ids=[number],
                    index=index,
                    finish_reason="stop" if number == len(said) else None,
                )


async def test_each_stream_has_its_whole_answer_and_one_end(ipc: str) -> None:
    async with echo_fabric(ipc) as (_, client), client.reader() as reader:
        streams = [reader.stream("echo", f"a{number} b", max_new_tokens=20) for number in range(30)]
        assert reader.open == 30
        texts: dict[AnswerStream, str] = dict.fromkeys(streams, "")
        ends: Counter[AnswerStream] = Counter()
        async for batch in reader:
            assert batch
            for stream, delta in batch:
                assert stream not in ends, "nothing comes after the end"
                if delta is None:
                    ends[stream] += 1
                    assert stream.done
                    assert stream.completion().text == texts[stream]
                else:
                    texts[stream] += delta.text
        assert ends == Counter(streams)
        assert list(texts.values()) == [words(f"a{number} b", 20) for number in range(30)]
        assert reader.open == 0
        with pytest.raises(StopAsyncIteration):
            await anext(reader)


async def test_choices_and_failures_are_their_streams_own(ipc: str) -> None:
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", Bursts(), slots=8)
        async with client.reader() as reader:
            several = reader.stream("bursts", "a b c", n=3)
            failing = reader.stream("bursts", "a fail")
            unknown = reader.stream("nope", "a")
            async for _ in reader:
                pass
            assert [choice.text for choice in several.completion().choices] == ["a b c "] * 3
            with pytest.raises(BackendError, match="as asked"):
                failing.completion()
            with pytest.raises(UnknownModelError):
                unknown.completion()


async def test_a_batch_holds_all_that_came_and_restores_all_credit(ipc: str) -> None:
    """A reader that does not look gets one delta of each stream, and an answer longer than its window goes on."""
    async with fabric(ipc) as made, AsyncClient(made.endpoint) as client:
        await made.add_worker("w0", Bursts(), slots=8)
        async with client.reader() as reader:
            streams = [reader.stream("bursts", "x " * LONG) for _ in range(3)]
            async for batch in reader:
                deltas = [stream for stream, delta in batch if delta is not None]
                assert len(deltas) == len(set(deltas)), "what came of one choice is one delta"
            assert all(stream.completion().text == "x " * LONG for stream in streams)


async def test_a_cancelled_read_loses_nothing_and_streams_may_come_later(ipc: str) -> None:
    async with echo_fabric(ipc) as (_, client), client.reader() as reader:
        reading = asyncio.ensure_future(reader.read())
        await asyncio.sleep(0)
        assert not reading.done(), "a read waits while there is no stream"
        with pytest.raises(RequestError, match="two tasks"):
            await reader.read()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        reading = asyncio.ensure_future(reader.read())
        await asyncio.sleep(0)
        stream = reader.stream("echo", "a b", max_new_tokens=30)
        with pytest.raises(RequestError, match="was not read"):
            stream.completion()
        assert {of for of, _ in await reading} == {stream}
        async for _ in reader:
            pass
        assert stream.text == words("a b", 30)


async def test_a_cancelled_stream_ends_alone(ipc: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, client), client.reader() as reader:
        endless = reader.stream("echo", "a", max_new_tokens=ENDLESS)
        other = reader.stream("echo", "a b", max_new_tokens=4)
        await reader.read()
        endless.cancel()
        ends = [stream async for batch in reader for stream, delta in batch if delta is None]
        assert sorted(ends, key=id) == sorted([endless, other], key=id)
        with pytest.raises(RequestCancelledError):
            endless.completion()
        assert other.completion().text == words("a b", 4)
        endless.cancel()
        await at_rest(made.controller)


@pytest.mark.parametrize("how", ["close", "leave", "drop"])
async def test_each_way_to_give_up_a_reader(ipc: str, how: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, client):
        reader = client.reader()
        for _ in range(3):
            reader.stream("echo", "a", max_new_tokens=ENDLESS)
        await reader.read()
        if how == "close":
            reading = asyncio.ensure_future(reader.read())
            await asyncio.sleep(0)
            await reader.aclose()
            with pytest.raises(ClosedError, match="reader was closed"):
                await reading
            with pytest.raises(ClosedError, match="reader was closed"):
                reader.stream("echo", "a")
            assert [batch async for batch in reader] == []
        elif how == "leave":
            async with reader:
                pass
        else:
            del reader
            gc.collect()
        await at_rest(made.controller)


async def test_a_closed_client_ends_its_readers(ipc: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (made, _):
        client = AsyncClient(made.endpoint)
        client.open()
        idle, busy = client.reader(), client.reader()
        waiting = asyncio.ensure_future(idle.read())
        stream = busy.stream("echo", "a", max_new_tokens=ENDLESS)
        await busy.read()
        await client.close()
        with pytest.raises(ClosedError, match="client was closed"):
            await waiting
        assert [of async for batch in busy for of, delta in batch if delta is None] == [stream]
        with pytest.raises(ClosedError):
            stream.completion()
        with pytest.raises(ClosedError, match="client was closed"):
            await busy.read()
        with pytest.raises(ClosedError):
            client.reader()
