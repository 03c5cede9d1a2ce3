"""Every way in which an upstream can fail, from a socket of our own."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.backends.faulty import (
    EVENTS,
    Announced,
    Asked,
    answer,
    api_worker,
    ask,
    chat_event,
    faulty,
    status,
    usual,
)
from zfabric.errors import (
    AuthenticationError,
    BackendError,
    ConnectionLostError,
    ContextOverflowError,
    EngineStalledError,
    FabricError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RequestError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
    UnsupportedOperationError,
    UnsupportedParameterError,
)
from zfabric.wire.payloads import GenerateRequest, Usage
from zfabric.wire.tasks import EmbedRequest
from zfabric.wire.traces import TraceContext
from zfabric.worker.traces import within

ONCE: dict[str, Any] = {"attempts": 1}


def text_of(deltas: list[Any]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_a_good_answer(tmp_path: Path) -> None:
    async with faulty(usual()) as server, api_worker(tmp_path, server.url, model="theirs") as worker:
        deltas = await ask(worker, stop=("x",), seed=0, max_new_tokens=9)
    assert text_of(deltas) == "fine"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(3, 1)
    body = server.asked[0].body
    assert server.asked[0].head.startswith("POST /chat/completions ")
    assert (body["model"], body["stop"], body["seed"], body["max_tokens"]) == ("theirs", ["x"], 0, 9)
    assert body["stream_options"] == {"include_usage": True}


async def test_an_upstream_goes_on_with_a_requests_trace(tmp_path: Path) -> None:
    context = TraceContext(1, 2, state="vendor=a")
    async with faulty(usual()) as server, api_worker(tmp_path, server.url) as worker:
        await ask(worker)
        with within(context, None):
            await ask(worker)
    plain, traced = (asked.head for asked in server.asked)
    assert "traceparent" not in plain
    assert f"traceparent: {context.traceparent}\r\n" in traced
    assert "tracestate: vendor=a\r\n" in traced


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, RequestError),
        (401, AuthenticationError),
        (402, QuotaExceededError),
        (403, PermissionDeniedError),
        (404, UnknownModelError),
        (413, TooLargeError),
        (422, RequestError),
        (429, RateLimitedError),
        (500, BackendError),
        (503, UnavailableError),
    ],
)
async def test_statuses_become_errors_without_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[FabricError]
) -> None:
    monkeypatch.setenv("TEST_TOKEN", "hf_verysecret")
    body = json.dumps({"error": {"message": "no, hf_verysecret is bad"}})
    keys = {"token_env": "TEST_TOKEN", "headers": {"X-Key": "other-secret"}, **ONCE}
    async with faulty(status(code, body)) as server, api_worker(tmp_path, server.url, **keys) as worker:
        with pytest.raises(FabricError, match=r"no, \[secret\] is bad") as caught:
            await ask(worker)
        shown = repr(worker._by_name["m"].upstream) + repr(caught.value) + str(caught.value.details)
    assert type(caught.value) is kind
    assert "Authorization: Bearer hf_verysecret" in server.asked[0].head.replace("authorization", "Authorization")
    assert "verysecret" not in shown
    assert "other-secret" not in shown


async def test_a_context_that_overflows_is_told_as_such(tmp_path: Path) -> None:
    body = '{"message": "This model\'s maximum context length is 8 tokens"}'
    async with faulty(status(400, body)) as server, api_worker(tmp_path, server.url) as worker:
        with pytest.raises(ContextOverflowError):
            await ask(worker)
    assert len(server.asked) == 1


async def test_retries_until_it_is_well(tmp_path: Path) -> None:
    scripts = [status(503, Retry_After="0"), answer(), answer(EVENTS), usual()]
    async with faulty(*scripts) as server, api_worker(tmp_path, server.url, attempts=4) as worker:
        assert text_of(await ask(worker)) == "fine"
    assert len(server.asked) == 4


async def test_a_long_retry_after_is_not_waited_for(tmp_path: Path) -> None:
    async with faulty(status(429, Retry_After="3600")) as server, api_worker(tmp_path, server.url) as worker:
        with pytest.raises(RateLimitedError):
            await ask(worker)
    assert len(server.asked) == 1


async def test_nothing_is_sent_twice_after_the_first_token(tmp_path: Path) -> None:
    async with faulty(answer(EVENTS, chat_event("half"))) as server, api_worker(tmp_path, server.url) as worker:
        seen: list[str] = []

        async def read() -> None:
            async for delta in worker.generate(GenerateRequest(prompt="hi", model="m")):
                seen.append(delta.text)

        with pytest.raises(ConnectionLostError):
            await read()
    assert seen == ["half"]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "garbage", [b"data: {nonsense\n\n", b"data: [1]\n\n", b'data: {"choices": [{"delta": 7}]}\n\n']
)
async def test_garbage_in_mid_stream(tmp_path: Path, garbage: bytes) -> None:
    async with (
        faulty(answer(EVENTS, chat_event("a"), garbage)) as server,
        api_worker(tmp_path, server.url) as worker,
    ):
        with pytest.raises(BackendError):
            await ask(worker)


async def test_no_http_and_no_events(tmp_path: Path) -> None:
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi"
    async with (
        faulty(answer(b"garbage\r\n\r\n"), answer(page)) as server,
        api_worker(tmp_path, server.url, **ONCE) as worker,
    ):
        with pytest.raises(ConnectionLostError):
            await ask(worker)
        with pytest.raises(BackendError, match="text/html"):
            await ask(worker)


async def test_nobody_listens(tmp_path: Path) -> None:
    async with faulty(usual()) as server:
        url = server.url
    async with api_worker(tmp_path, url, attempts=2) as worker:
        with pytest.raises(ConnectionLostError):
            await ask(worker)


async def test_silence_before_the_first_and_between_tokens(tmp_path: Path) -> None:
    async def silent(asked: Asked) -> None:
        await asked.gone()

    async def pinging(asked: Asked) -> None:
        await asked.send(EVENTS, chat_event("a"))
        while not asked.writer.is_closing():
            await asked.send(b": keep-alive\n\n")

    keys = {"first_token_ms": 200, "between_tokens_ms": 100, **ONCE}
    async with faulty(silent, pinging) as server, api_worker(tmp_path, server.url, **keys) as worker:
        with pytest.raises(EngineStalledError) as first:
            await ask(worker)
        with pytest.raises(EngineStalledError) as between:
            await ask(worker)
    assert (first.value.details["limit_ms"], between.value.details["limit_ms"]) == (200, 100)


async def test_bytes_may_be_cut_anywhere(tmp_path: Path) -> None:
    event = 'data: {"choices":[{"index":0,"delta":{"content":"世é😀\u2028"}}]}\r\n\r\n'.encode()
    pieces = [bytes([byte]) for byte in b": comment\r\n\r\nevent: x\r\n" + event]
    async with (
        faulty(answer(EVENTS, *pieces, chat_event(finish="length"))) as server,
        api_worker(tmp_path, server.url) as worker,
    ):
        deltas = await ask(worker)
    assert text_of(deltas) == "世é😀\u2028"
    assert deltas[-1].finish_reason == "length"


async def test_halves_of_characters_in_two_events(tmp_path: Path) -> None:
    halves = [b'"\xc3"', b'"\xa9"', b'"\\ud83d"', b'"\\ude00"', b'"\xe4\xb8"']
    events = [b'data: {"choices":[{"index":0,"delta":{"content":' + half + b"}}]}\n\n" for half in halves]
    async with (
        faulty(answer(EVENTS, *events, chat_event(finish="stop"))) as server,
        api_worker(tmp_path, server.url) as worker,
    ):
        assert text_of(await ask(worker)) == "é😀\ufffd\ufffd"


async def test_a_line_of_ten_megabytes_and_one_that_is_too_long(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    endless = answer(EVENTS, b"data: ", *([b"y" * 1_000_000] * 20))
    good = answer(EVENTS, chat_event(long), chat_event(finish="stop"))
    async with faulty(good, endless) as server, api_worker(tmp_path, server.url) as worker:
        assert text_of(await ask(worker)) == long
        with pytest.raises(BackendError, match="more than"):
            await ask(worker)


async def test_an_error_inside_of_the_stream(tmp_path: Path) -> None:
    event = b'data: {"error": {"message": "too busy", "code": 429}}\n\n'
    async with faulty(answer(EVENTS, event)) as server, api_worker(tmp_path, server.url) as worker:
        with pytest.raises(RateLimitedError, match="too busy"):
            await ask(worker)


@pytest.mark.parametrize("pieces", [(), (EVENTS,), (EVENTS, chat_event("a"))])
async def test_a_cancel_closes_the_connection(tmp_path: Path, pieces: tuple[bytes, ...]) -> None:
    waiting, closed = asyncio.Event(), asyncio.Event()

    async def endless(asked: Asked) -> None:
        await asked.send(*pieces)
        waiting.set()
        await asked.gone()
        closed.set()

    async with faulty(endless) as server, api_worker(tmp_path, server.url) as worker:
        task = asyncio.create_task(ask(worker))
        async with asyncio.timeout(5):
            await waiting.wait()
            task.cancel()
            await closed.wait()


async def test_a_stop_string_found_here_ends_it_upstream(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def endless(asked: Asked) -> None:
        await asked.send(EVENTS, chat_event("one tw"), chat_event("o three"))
        await asked.gone()
        closed.set()

    async with faulty(endless) as server, api_worker(tmp_path, server.url, server_stops=False) as worker:
        deltas = await ask(worker, stop=("two",))
        async with asyncio.timeout(5):
            await closed.wait()
    assert text_of(deltas) == "one "
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(0, 2, estimated=True)
    assert "stop" not in server.asked[0].body


async def test_what_fails_again_and_again_is_taken_out_and_probed_back(tmp_path: Path) -> None:
    async with faulty(status(500)) as server, api_worker(tmp_path, server.url, **ONCE) as worker:
        sink = worker.steps
        assert isinstance(sink, Announced)
        for _ in range(5):
            with pytest.raises(BackendError):
                await ask(worker)
        assert sink.models == [[]]
        assert worker.load_report().gauges == {"upstreams_out": 1.0}
        with pytest.raises(ConnectionLostError, match="taken out"):
            await ask(worker)
        assert len(server.asked) == 5
        sink.changed.clear()
        server.scripts[:] = [status(404), usual()]
        async with asyncio.timeout(10):
            await sink.changed.wait()
        assert sink.models == [[], ["m"]]
        assert text_of(await ask(worker)) == "fine"


def generated(token_id: int, text: str, details: dict[str, Any] | None = None, **more: Any) -> bytes:
    """One event of text generation inference's generate_stream."""
    token = {"id": token_id, "text": text, "logprob": -0.25, "special": text == "</s>"}
    whole = None if details is None else "one two"
    event = {"index": token_id, "token": token, "generated_text": whole, "details": details, **more}
    return b"data:" + json.dumps(event).encode() + b"\n\n"


TGI: dict[str, Any] = {"protocol": "tgi"}


@pytest.mark.parametrize(
    ("reason", "last", "meant"),
    [("length", " two", "length"), ("eos_token", "</s>", "stop"), ("stop_sequence", "!!", "stop")],
)
async def test_text_generation_ends_as_it_says(tmp_path: Path, reason: str, last: str, meant: str) -> None:
    details = {"finish_reason": reason, "generated_tokens": 2, "input_length": 5, "seed": None}
    top = [{"id": 7, "text": "x", "logprob": -0.125, "special": False}]
    # As the server's framework keeps a connection alive: a comment without text.
    pieces = [b":\n\n", generated(1, "one", top_tokens=top), b":\n\n", generated(2, last, details)]
    async with faulty(answer(EVENTS, *pieces)) as server, api_worker(tmp_path, server.url, **TGI) as worker:
        deltas = await ask(worker, stop=("!!",), logprobs=1, max_new_tokens=2)
    assert text_of(deltas) == ("one two" if reason == "length" else "one")
    assert [token for delta in deltas for token in delta.token_ids] == [1, 2]
    assert deltas[-1].finish_reason == meant
    assert deltas[-1].usage == Usage(5, 2)
    assert deltas[0].logprobs is not None
    assert deltas[0].logprobs[0].top[0].token_id == 7
    body = server.asked[0].body
    assert body["parameters"] == {
        "details": True, "return_full_text": False, "do_sample": True, "temperature": 1.0, "max_new_tokens": 2,
        "stop": ["!!"], "top_n_tokens": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "said", "meant"),
    [
        ("overloaded", "Model is overloaded", RateLimitedError),
        ("validation", "Input validation error: `temperature` must be strictly positive", RequestError),
        ("validation", "Input validation error: `inputs` must have less than 8 tokens. Given: 9", ContextOverflowError),
        ("generation", "Request failed during generation: CUDA", BackendError),
        ("incomplete_generation", "Incomplete generation", BackendError),
    ],
)
async def test_text_generation_tells_errors_as_events(
    tmp_path: Path, kind: str, said: str, meant: type[FabricError]
) -> None:
    event = b"data:" + json.dumps({"error": said, "error_type": kind}).encode() + b"\n\n"
    async with faulty(answer(EVENTS, event)) as server, api_worker(tmp_path, server.url, **TGI, attempts=2) as worker:
        with pytest.raises(FabricError, match=said.partition("`")[0]) as caught:
            await ask(worker)
    assert type(caught.value) is meant
    # Nothing had come yet, so what another try may better is tried again.
    assert len(server.asked) == (2 if kind == "overloaded" else 1)


async def test_text_generation_goes_on_with_an_answer_by_drawing_it_again(tmp_path: Path) -> None:
    details = {"finish_reason": "length", "generated_tokens": 2, "input_length": 5}
    script = answer(EVENTS, generated(1, "one"), generated(2, " two", details))
    async with faulty(script) as server, api_worker(tmp_path, server.url, **TGI) as worker:
        (info,) = worker._infos()
        assert "resume" in info.capabilities
        deltas = await ask(worker, resume_token_ids=[1], resume_characters=2, max_new_tokens=2)
        assert (text_of(deltas), [token for delta in deltas for token in delta.token_ids]) == ("e two", [2])
        assert deltas[-1].usage == Usage(5, 2)
        with pytest.raises(BackendError, match="differs after 1 tokens"):
            await ask(worker, resume_token_ids=[1, 3], resume_characters=5, max_new_tokens=2)
    assert server.asked[0].body["parameters"]["max_new_tokens"] == 2


async def test_an_overloaded_server_is_asked_again_but_not_after_a_token(tmp_path: Path) -> None:
    event = b'data:{"error":"Model is overloaded","error_type":"overloaded"}\n\n'
    details = {"finish_reason": "length", "generated_tokens": 1}
    good = answer(EVENTS, generated(1, "one", details))
    scripts = [answer(EVENTS, event), good, answer(EVENTS, generated(1, "one"), event)]
    async with faulty(*scripts) as server, api_worker(tmp_path, server.url, **TGI) as worker:
        deltas = await ask(worker)
        assert text_of(deltas) == "one"
        # An older server tells no length of the prompt.
        assert deltas[-1].usage == Usage(0, 1, estimated=True)
        with pytest.raises(RateLimitedError):
            await ask(worker)
    assert len(server.asked) == 3


async def test_embeddings_keep_their_order_and_their_limit(tmp_path: Path) -> None:
    running = most = 0

    async def vectors(asked: Asked) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        texts = asked.body["inputs"]
        await asyncio.sleep(0.02 if texts[0] == "0" else 0)
        # Before the answer leaves: after it, the worker may ask again at once.
        running -= 1
        body = json.dumps([[float(text) + 1, 0.0] for text in texts]).encode()
        await asked.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    keys = {"protocol": "feature-extraction", "batch_size": 2, "parallel": 3}
    async with faulty(vectors) as server, api_worker(tmp_path, server.url, **keys) as worker:
        inputs: list[str | list[int]] = [str(number) for number in range(11)]
        result = await worker.embed(EmbedRequest(inputs=inputs, model="m", normalize=False))
    import numpy

    rows = numpy.frombuffer(result.data, "<f4").reshape(result.rows, result.dimensions)
    assert rows[:, 0].tolist() == [number + 1 for number in range(11)]
    assert most <= 3
    assert len(server.asked) == 6


@pytest.mark.parametrize("encoded", [True, False])
async def test_vectors_of_the_openai_form_are_put_in_order(tmp_path: Path, encoded: bool) -> None:
    async def vectors(asked: Asked) -> None:
        lines = []
        for index, tokens in enumerate(asked.body["input"]):
            row = [float(token) for token in tokens]
            lines.append({"index": index, "embedding": base64.b64encode(struct.pack("<2f", *row)).decode()})
            if not encoded:
                lines[-1]["embedding"] = row
        body = json.dumps({"data": lines[::-1]}).encode()
        await asked.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    keys = {"protocol": "embeddings", "batch_size": 2, "model": "theirs"}
    async with faulty(vectors) as server, api_worker(tmp_path, server.url, **keys) as worker:
        inputs: list[str | list[int]] = [[number, 1] for number in range(5)]
        result = await worker.embed(EmbedRequest(inputs=inputs, model="m", normalize=False))
        assert struct.unpack("<10f", result.data)[::2] == (0, 1, 2, 3, 4)
        assert {asked.body["model"] for asked in server.asked} == {"theirs"}
        assert len(server.asked) == 3
        with pytest.raises(UnsupportedParameterError, match="truncate"):
            await worker.embed(EmbedRequest(inputs=inputs, model="m", truncate="cut"))
        with pytest.raises(UnsupportedOperationError, match="not both"):
            await worker.embed(EmbedRequest(inputs=["a", [1]], model="m"))
