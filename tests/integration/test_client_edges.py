"""The client's edges: what it refuses, who refuses it, what hostile or broken peers send, forks, and other loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio

from tests.fabric import at_rest, echo_fabric, fabric, words
from zfabric import (
    AsyncClient,
    Client,
    ClosedError,
    ConfigurationError,
    ConnectionLostError,
    DeadlineExceededError,
    FabricError,
    ProtocolError,
    QuotaExceededError,
    TokenStream,
    VersionMismatchError,
    WorkerLostError,
)
from zfabric.backends.echo import EchoOptions
from zfabric.client import connection as connection_module
from zfabric.client.mailbox import Collector
from zfabric.limits import BAD_FRAMES_MAX, NAME_LENGTH_MAX
from zfabric.wire import codec, kinds
from zfabric.wire.answers import Chunk, Outcome
from zfabric.wire.chunks import EndsBody
from zfabric.wire.messages import End, Ends, Goodbye, Submit, Welcome
from zfabric.wire.questions import Answer
from zfabric.wire.tasks import EmbedRequest

SLOW = EchoOptions(tokens_per_second=200)


def wrong_calls(client: AsyncClient) -> dict[str, Callable[[], Any]]:
    """One of each call with something that cannot be sent."""
    half: Any = "half \ud800"
    odd: Any = object()
    return {
        "prompt": lambda: client.generate("echo", half),
        "logit_bias": lambda: client.generate("echo", "x", logit_bias={2**70: 1.0}),
        "stop": lambda: client.generate("echo", "x", stop=odd),
        "deadline_ms": lambda: client.generate("echo", "x", deadline_ms="5"),  # type: ignore[arg-type]
        "priority": lambda: client.generate("echo", "x", priority=0.5),  # type: ignore[arg-type]
        "nonsense": lambda: client.generate("echo", "x", nonsense=1),  # type: ignore[call-arg]
        "messages": lambda: client.chat("echo", [{"role": "user", "content": odd}]),
        "model": lambda: client.generate(half, "x"),
        "inputs": lambda: client.embed("echo", odd),
        "truncate": lambda: client.embed("echo", "x", truncate="much"),  # type: ignore[arg-type]
        "timeout": lambda: client.count_tokens("echo", "x", timeout=odd),
        "arguments": lambda: client.operate("w0", "call", thing=odd),
        "call": lambda: client.operate("w0", half),
        "worker": lambda: client.operate(odd, "call"),
        "kind": lambda: client.models(odd),
        "limit_ms": lambda: client.drain_worker("w0", limit_ms=odd),
    }


@pytest.mark.parametrize("name", wrong_calls(AsyncClient("ipc:///nowhere")))
async def test_a_wrong_call_before_the_welcome_is_the_callers_alone(ipc: str, name: str) -> None:
    """It is the usual first call; once it took every other one of the client along."""
    async with AsyncClient(ipc) as client:
        neighbour = asyncio.create_task(client.generate("echo", "a b", max_new_tokens=2))
        question = asyncio.create_task(client.status())
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(FabricError) as caught:
                await wrong_calls(client)[name]()
            assert caught.value.details["parameter"] == name
            assert name in caught.value.message
        # A controller that has just started waits for its workers, so the request may come before them.
        async with fabric(ipc, recovery_ms=5_000) as made:
            await made.add_worker("w0")
            assert (await neighbour).text == "a b "
            assert (await question).protocol == kinds.PROTOCOL_VERSION
            with pytest.raises(FabricError, match=name):
                await wrong_calls(client)[name]()
            row: Any = np.array([[5, 6], [7, 8]])[1]
            assert (await client.generate("echo", prompt_token_ids=row, max_new_tokens=2)).text == "7 8 "
            assert client.figures()["bad_messages"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"endpoint": 5},
        {"endpoint": "nonsense"},
        {"endpoint": "tcp://host"},
        {"endpoint": "ipc://\ud800"},
        {"label": "x" * (NAME_LENGTH_MAX + 1)},
        {"label": "\ud800"},
        {"label": None},
        {"connect_timeout_ms": "5"},
        {"connect_timeout_ms": -1},
        {"connect_timeout_ms": 1.5},
        {"connect_timeout_ms": True},
        {"credentials": "key"},
    ],
    ids=str,
)
def test_a_client_that_cannot_work_is_not_made(arguments: dict[str, Any]) -> None:
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for kind in (AsyncClient, Client):
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            kind(**{"endpoint": "ipc:///tmp/x.sock", **arguments})
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_no_number_of_a_request_follows_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is told numbers of what it runs, and could write to whatever it knows the number of."""
    client = AsyncClient("ipc:///nowhere/at-all")
    session = client._connection.session
    wanted = [5, 2**62, 7]
    drawn = iter(wanted)
    # Each is what the operating system drew for it, and no state of this process goes into it.
    monkeypatch.setattr("random._urandom", lambda count: (next(drawn) << 1).to_bytes(count, "big"))
    sink = Collector(1, lambda: None, lambda _: None)
    request = EmbedRequest(inputs=["x"])
    assert [session.submit("embed", request, sink, 1, model="m").number for _ in wanted] == wanted


def test_a_client_that_failed_to_open_says_the_same_again(ipc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLink:
        def __init__(self, *_: object) -> None:
            raise OSError(24, "too many open files")

    client = Client(ipc)
    with monkeypatch.context() as patch:
        patch.setattr(connection_module, "open_dealer", NoLink)
        for call in (client.status, client.__enter__, lambda: client.stream("echo", "x"), client.status):
            with pytest.raises(ConnectionLostError, match="too many open files"):
                call()
    assert not [thread for thread in threading.enumerate() if thread.name == "zfabric-client"]
    with pytest.raises(ConnectionLostError, match="no controller answered"):
        client.status(timeout=0.01)
    client.close()
    with pytest.raises(ClosedError):
        client.status()


async def test_a_client_is_of_one_loop_and_of_one_time(ipc: str) -> None:
    client = AsyncClient(ipc)
    with pytest.raises(ClosedError, match="not open"):
        await client.status()
    with pytest.raises(ClosedError, match="not open"):
        client.stream("echo", "x")
    async with echo_fabric(ipc) as (_, other):
        stream = other.stream("echo", "a b", max_new_tokens=2)

        def elsewhere() -> None:
            for call in (other.status, stream.collect, lambda: other.generate("echo", "x")):
                with pytest.raises(ClosedError, match="another event loop"):
                    asyncio.run(call())
            with pytest.raises(ClosedError, match="no event loop"):
                other.stream("echo", "x")
            with pytest.raises(ClosedError, match="no event loop"):
                AsyncClient(ipc).open()

        await asyncio.to_thread(elsewhere)
        assert (await stream).text == "a b "
        await other.close()
        with pytest.raises(ClosedError):
            other.open()


# ── refusals and silence ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refusal_that_may_pass_is_told_after_the_connect_timeout_and_tried_again(ipc: str) -> None:
    async with fabric(ipc, clients_max=1) as made:
        await made.add_worker("w0")
        async with AsyncClient(made.endpoint) as first:
            await first.status()
            async with AsyncClient(made.endpoint, connect_timeout_ms=200) as second:
                waiting = [
                    asyncio.create_task(second.generate("echo", "x")),
                    asyncio.create_task(second.status()),
                    asyncio.create_task(second.stream("echo", "x").collect()),
                ]
                for result in await asyncio.gather(*waiting, return_exceptions=True):
                    assert isinstance(result, QuotaExceededError)
            async with AsyncClient(made.endpoint) as third:
                patient = asyncio.create_task(third.generate("echo", "a", max_new_tokens=1))
                await asyncio.sleep(0.1)
                await first.close()
                assert (await patient).text == "a "


async def test_each_request_has_the_whole_connect_timeout(ipc: str) -> None:
    async with AsyncClient(ipc, connect_timeout_ms=300) as client:
        first = asyncio.create_task(client.status())
        await asyncio.sleep(0.2)
        second = asyncio.create_task(client.status())
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        assert first.done()
        assert not second.done()
        for task in (first, second):
            with pytest.raises(ConnectionLostError):
                await task


class FakeController:
    """A ROUTER that welcomes clients, and otherwise says what a test wants."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(endpoint)
        self.peer = b""
        self.session = 3

    async def hear(self, kind: int) -> list[bytes]:
        """The next message of a kind: its frames. HELLOs are welcomed meanwhile."""
        while True:
            self.peer, *frames = await self.socket.recv_multipart()
            if frames[0][0] == kinds.CLIENT_HELLO:
                await self.say(
                    codec.pack(
                        Welcome(
                            version=kinds.PROTOCOL_VERSION, build="", epoch=1, session=self.session, token=b"t", beat_ms=1_000,
                            lease_ms=3_000, frame_bytes_max=2**26,
                        )
                    )
                )  # fmt: skip
            if frames[0][0] == kind:
                return list(frames)

    async def submit(self) -> Submit:
        """The next SUBMIT."""
        header, _ = await self.hear(kinds.SUBMIT)
        envelope: Submit = codec.unpack_envelope(header)
        return envelope

    async def say(self, *messages: codec.Frames) -> None:
        for header, body in messages:
            frames = [self.peer, header] + ([body] if header[:1] and header[0] in kinds.WITH_BODY else [])
            await self.socket.send_multipart(frames)

    async def finish(self, submit: Submit, units: int) -> None:
        """End a request well."""
        ends = Ends(instance=1, ends=[End(request=submit.request, attempt=submit.attempt)])
        await self.say((codec.pack_envelope(ends), codec.encode(EndsBody(outcomes=[Outcome(units=units)]))))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@contextlib.asynccontextmanager
async def fake(ipc: str, **options: Any) -> AsyncIterator[tuple[FakeController, AsyncClient]]:
    controller = FakeController(ipc)
    try:
        async with AsyncClient(ipc, **options) as client:
            yield controller, client
    finally:
        controller.close()


async def test_no_query_waits_for_ever(ipc: str) -> None:
    """A controller that takes everything and answers nothing."""
    async with fake(ipc) as (controller, client):
        listening = asyncio.create_task(controller.hear(kinds.DRAIN))
        calls = [
            client.models(timeout=0.1), client.model_details("m", timeout=0.1), client.workers(timeout=0.1),
            client.status(timeout=0.1), client.refresh(timeout=0.1), client.drain_worker("w", timeout=0.1),
        ]  # fmt: skip
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, DeadlineExceededError)
        calls = [client.count_tokens("m", "x", timeout=0), client.operate("w", "x", timeout=0)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, DeadlineExceededError)
        assert not client._connection.session.busy
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_a_question_is_answered_in_parts(ipc: str) -> None:
    async with fake(ipc) as (controller, client):
        asked = asyncio.create_task(client.refresh())
        header, *_ = await controller.hear(kinds.QUERY)
        number = codec.unpack_control(header).number
        for part, more in ((["a", "b"], True), ([], True), (["c"], False)):
            await controller.say(codec.pack(Answer(number=number, code=0, result=codec.raw(part), more=more)))
        assert await asked == ["a", "b", "c"]
        asked = asyncio.create_task(client.refresh())
        header, *_ = await controller.hear(kinds.QUERY)
        number = codec.unpack_control(header).number
        await controller.say(codec.pack(Answer(number=number, code=0, result=codec.raw({"no": "list"}))))
        with pytest.raises(ProtocolError):
            await asked


async def test_a_fault_ends_the_request_that_it_names(ipc: str, caplog: pytest.LogCaptureFixture) -> None:
    async with fake(ipc) as (controller, client):
        first, second = client.stream("m", "x"), client.stream("m", "x")
        one, two = await controller.submit(), await controller.submit()
        error = ProtocolError("this was no use")
        await controller.say(codec.pack_fault(error))
        await controller.say(codec.pack_fault(error, codec.Subject(request=one.request, attempt=0)))
        with pytest.raises(ProtocolError, match="no use"):
            await first
        await controller.finish(two, 0)
        assert (await second).text == ""
        assert client.figures()["faults"] == 1
        assert "this was no use" in caplog.text


async def test_a_client_that_is_refused_in_the_middle_comes_back(ipc: str) -> None:
    async with fake(ipc) as (controller, client):
        stream = client.stream("m", "x")
        submit = await controller.submit()
        await controller.say(codec.pack_refused(QuotaExceededError("later")))
        hello, *_ = await controller.hear(kinds.CLIENT_HELLO)
        (claim,) = codec.unpack_control(hello).claims
        assert claim.request == submit.request
        await controller.finish(submit, 0)
        await stream
        stream = client.stream("m", "x")
        await controller.submit()
        await controller.say(codec.pack_refused(VersionMismatchError("never")))
        with pytest.raises(VersionMismatchError):
            await stream
        with pytest.raises(VersionMismatchError):
            await client.generate("m", "x")


async def test_a_controller_that_says_goodbye_and_stays_is_given_up(ipc: str) -> None:
    """Without a session nobody serves what waits, whether or not the connection stands."""
    async with fake(ipc, connect_timeout_ms=200) as (controller, client):
        stream = client.stream("m", "x")
        await controller.submit()
        await controller.say(codec.pack(Goodbye("x")))
        with pytest.raises(ConnectionLostError):
            await stream


def hostile(rng: random.Random, numbers: list[int]) -> Iterator[codec.Frames]:
    """Messages that are wrong in one place or in all, about requests that exist and others."""
    details = [{"message": "x"}, {"self": 1}, {"a": [1]}, {1: 2}, "x", None, {"claim_ms": 5}, {"resumable": False}]
    values: list[Any] = [0, 1, -1, 2**31, 2**63, 2**64 - 1, None, "", "x" * 300, b"\xff", [], {}, 1.5, True, *details]
    while True:
        number = rng.choice([*numbers, 5])
        kind = rng.choice(
            sorted(kinds.TO_CLIENT - {kinds.GOODBYE, kinds.REFUSED, kinds.UNKNOWN_SESSION, kinds.WELCOME})
        )
        if kind == kinds.CHUNKS:
            chunk = [number, 0, 0, 0, "a", [1], [None] * 6]
            chunk[rng.randrange(1, 7)] = rng.choice(values)
            if isinstance(chunk[6], list) and chunk[6]:
                chunk[6][rng.randrange(6)] = rng.choice(values)
            yield codec.chunks_route(3) + msgpack.packb([chunk]), b""
        elif kind == kinds.ENDS:
            ends: list[Any] = [1, [[number, 0, rng.choice([0, 40301, 50301, 49901, 99_999, 7])]]]
            outcome = [
                rng.choice(values),
                rng.choice(values),
                rng.choice(values),
                rng.choice(details),
                rng.choice(values),
            ]
            body = rng.choice([[[], [outcome]], [[], []], [outcome], outcome, "x"])
            yield bytes([kind]) + msgpack.packb(ends), msgpack.packb(body)
        else:
            fields = [rng.choice([*values, number]) for _ in range(rng.randrange(8))]
            yield bytes([kind]) + rng.choice([msgpack.packb(fields), rng.randbytes(9), b""]), b""


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_that_a_peer_sends_stops_the_pump(ipc: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Each request ends or goes on; none of the noise reaches a neighbour, and none of it raises in the loop."""
    caplog.set_level(logging.ERROR, "asyncio")
    async with fake(ipc) as (controller, client):
        streams = [client.stream("m", "x", max_new_tokens=5, resume="never") for _ in range(20)]
        readers = [asyncio.create_task(stream.collect()) for stream in streams]
        submits = [await controller.submit() for _ in streams]
        noise = hostile(random.Random(seed), [submit.request for submit in submits[:10]])
        for _ in range(400):
            await controller.say(next(noise))
        for submit in submits[10:]:
            chunk = Chunk(submit.request, 0, 0, 0, "fine", [1])
            await controller.say(codec.pack_chunks(3, [chunk]))
            await controller.finish(submit, 1)
        for completion in await asyncio.gather(*readers[10:]):
            assert completion.text == "fine"
        for stream in streams[:10]:
            stream.cancel()
        for result in await asyncio.gather(*readers[:10], return_exceptions=True):
            assert isinstance(result, FabricError) or not isinstance(result, BaseException)
        assert not client._connection.session.busy
        figures = client.figures()
        assert figures["bad_messages"] > 0
        assert len([r for r in caplog.records if r.name == "zfabric.client"]) <= BAD_FRAMES_MAX
        assert not [record for record in caplog.records if record.name == "asyncio"]


async def test_a_client_that_lost_its_worker_claims_and_its_stream_goes_on(ipc: str) -> None:
    async with fake(ipc) as (controller, client):
        stream = client.stream("m", "x", resume="never")
        submit = await controller.submit()
        await controller.say(codec.pack_chunks(3, [Chunk(submit.request, 0, 0, 0, "a ", [1])]))
        error = WorkerLostError("lost", claim_ms=1_500)
        outcome = Outcome(units=1, message=error.message, details=error.details)
        end = Ends(instance=1, ends=[End(request=submit.request, attempt=0, code=error.code)])
        await controller.say((codec.pack_envelope(end), codec.encode(EndsBody(outcomes=[outcome]))))
        header, *_ = await controller.hear(kinds.CLAIMS)
        (claim,) = codec.unpack_control(header).claims
        assert (claim.request, claim.attempt, claim.next) == (submit.request, 0, 1)
        await controller.say(codec.pack_chunks(3, [Chunk(submit.request, 0, 0, 1, "b", [2])]))
        await controller.finish(submit, 2)
        assert (await stream).text == "a b"


# ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_child(use: Callable[[], None], limit_s: int = 10) -> None:
    """Run in a forked child; fails if it raises or hangs."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(limit_s)
            use()
            code = 0
        except BaseException as error:  # noqa: BLE001 — a child must not go on as the test
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ClosedError, match="after a fork"):
        call()


async def test_a_blocking_stream_is_of_no_use_in_a_forked_child(ipc: str) -> None:
    def use(endpoint: str) -> None:
        with Client(endpoint) as client:
            stream = client.stream("echo", "a b", max_new_tokens=40)
            idle = client.stream("echo", "a b", max_new_tokens=40)
            texts, batch = stream.texts(), client.generate_many("echo", ["a"] * 4, concurrency=2, max_new_tokens=1)
            assert next(stream).text
            # As if another thread were in the middle of it.
            stream._mailbox.changed.acquire()

            def child() -> None:
                for call in (
                    lambda: next(stream), lambda: list(idle), lambda: next(texts), stream.collect, stream.cancel,
                    stream.close, lambda: next(batch), batch.close, lambda: stream.__enter__(), client.status,
                    lambda: client.generate_many("echo", ["a"]), lambda: client.stream("echo", "a"),
                ):  # fmt: skip
                    refused(call)
                assert stream.text
                idle.__exit__(None, None, None)
                batch.__exit__(None, None, None)
                client.close()

            def dropping() -> None:
                nonlocal stream, idle, texts, batch
                del stream, idle, texts, batch
                gc.collect()

            in_child(child)
            in_child(dropping)
            stream._mailbox.changed.release()
            assert stream.collect().text == idle.collect().text == words("a b", 40)
            assert len(list(batch)) == 4

    async with echo_fabric(ipc, options=SLOW) as (made, _):
        await asyncio.to_thread(use, made.endpoint)
        await at_rest(made.controller)


async def test_an_asyncio_stream_is_of_no_use_in_a_forked_child(ipc: str) -> None:
    async with echo_fabric(ipc, options=SLOW) as (_, client):
        stream: TokenStream = client.stream("echo", "a b", max_new_tokens=40)
        await anext(stream)
        batch = client.generate_many("echo", ["a"] * 2, max_new_tokens=1)
        reader = client.reader()
        answer = reader.stream("echo", "a b", max_new_tokens=40)

        def run(call: Callable[[], Any]) -> None:
            """Without the parent's loop, whose selector the child shares."""
            coroutine = call()
            if hasattr(coroutine, "send"):
                coroutine.send(None)

        def child() -> None:
            for call in (
                lambda: stream.__anext__(), stream.collect, stream.aclose, stream.cancel, stream.__aenter__,
                lambda: stream.texts().__anext__(), lambda: batch.__anext__(), batch.aclose, client.status,
                lambda: client.generate("echo", "x"), lambda: client.stream("echo", "x"), client.open,
                reader.read, lambda: reader.__anext__(), reader.aclose, reader.__aenter__, answer.cancel, client.reader,
                lambda: reader.stream("echo", "x"),
            ):  # fmt: skip
                refused(lambda call=call: run(call))  # type: ignore[misc]
            with contextlib.suppress(StopIteration):
                client.close().send(None)

        in_child(child)
        assert (await stream).text == words("a b", 40)
        assert len([entry async for entry in batch]) == 2


async def test_a_child_makes_clients_of_its_own(ipc: str) -> None:
    """While the parent's go on."""

    def use(endpoint: str) -> None:
        with Client(endpoint) as client:
            stream = client.stream("echo", "a b", max_new_tokens=40)

            def child() -> None:
                with Client(endpoint) as own:
                    assert own.generate("echo", "c", max_new_tokens=2).text == "c c "

            in_child(child)
            assert stream.collect().text == words("a b", 40)

    async with echo_fabric(ipc, options=SLOW) as (made, _):
        await asyncio.to_thread(use, made.endpoint)
