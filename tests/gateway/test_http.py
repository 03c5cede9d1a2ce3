"""What HTTP itself asks of a gateway: statuses, limits, keys, pages in browsers, callers that go away, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.backends import Slow
from tests.gateway.conftest import gateway
from zfabric import AnswerReader, AsyncClient, files
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.errors import ConfigurationError
from zfabric.files import WatchedFile
from zfabric.gateway import chat, generation, http
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.keys import ApiKey, KeyTable, read_keys
from zfabric.gateway.server import Gateway
from zfabric.testing import serving
from zfabric.wire.payloads import GenerateRequest
from zfabric.wire.tasks import EmbedRequest, EmbedResult
from zfabric.worker.traces import trace_headers

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}


async def test_alive_ready_and_models() -> None:
    async with (
        gateway(EchoWorker(EchoOptions(model_names=("org/echo", "nick")))) as served,
        httpx.AsyncClient(base_url=served.url) as web,
    ):
        assert (await web.get("/health")).status_code == 200
        ready = await web.get("/ready")
        assert (ready.status_code, ready.json()["models"]) == (200, ["org/echo"])
        assert [model.id async for model in served.openai.models.list()] == ["org/echo", "nick"]
        assert (await served.openai.models.retrieve("org/echo")).id == "org/echo"
        assert (await web.get("/v1/models/nick")).json()["root"] == "org/echo"
        assert (await web.get("/v1/models/nobody")).status_code == 404


async def test_a_callers_trace_goes_on_to_the_engine() -> None:
    """Also where nobody here makes spans; and what is malformed, or the call before, leaves none."""
    told: list[dict[str, str]] = []

    class Told(EchoWorker):
        def begin(self, request: GenerateRequest) -> None:
            told.append(trace_headers())
            super().begin(request)

        async def embed(self, request: EmbedRequest) -> EmbedResult:
            told.append(trace_headers())
            return await super().embed(request)

    given = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", "tracestate": "vendor=a"}
    async with gateway(Told()) as served, httpx.AsyncClient(base_url=served.url) as web:
        for headers in (given, {}, {"traceparent": "00-nonsense"}):
            assert (await web.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        asked = {"model": "echo", "input": "x"}
        assert (await web.post("/v1/embeddings", json=asked, headers=given)).status_code == 200
    assert told == [given, {}, {}, given]


async def test_paths_and_methods_that_are_none() -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        missing = await web.post("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
        wrong = await web.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_none_is_refused(body: bytes) -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        refused = await web.post("/v1/chat/completions", content=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_over_the_limit_is_refused_declared_or_not() -> None:
    async with gateway(EchoWorker(), body_limit=2_000) as served, httpx.AsyncClient(base_url=served.url) as web:
        declared = await web.post("/v1/chat/completions", content=b"x" * 2_001)

        async def parts() -> Any:
            for _ in range(3):
                yield b"x" * 1_000

        chunked = await web.post("/v1/chat/completions", content=parts())
        assert (declared.status_code, chunked.status_code) == (413, 413)
        assert (await web.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_PAUSE_MS", 50)
    async with gateway(EchoWorker()) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 504")
        writer.close()


async def test_names_of_requests() -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        named = await web.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine-1"})
        assert (named.headers["x-request-id"], named.json()["id"]) == ("mine-1", "chatcmpl-mine-1")
        made = await web.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "not a name"})
        assert len(made.headers["x-request-id"]) == 32


async def test_keys_let_in_whom_they_name(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"sk-hashed").hexdigest()
    file = tmp_path / "keys.toml"
    file.write_text(f'[team]\nkey = "sk-plain"\nmodels = ["other"]\n[hashed]\nsha256 = "{digest}"\n')
    async with gateway(EchoWorker(), keys=read_keys(file)) as served, httpx.AsyncClient(base_url=served.url) as web:

        async def ask(headers: dict[str, str]) -> tuple[int, str]:
            response = await web.post("/v1/chat/completions", json=CHAT, headers=headers)
            return response.status_code, response.json().get("error", {}).get("code", "")

        assert await ask({"authorization": "Bearer sk-hashed"}) == (200, "")
        assert await ask({"x-api-key": "sk-hashed"}) == (200, "")
        assert await ask({"authorization": "Bearer sk-plain"}) == (404, "model_not_found")
        assert await ask({"authorization": "Bearer wrong"}) == (401, "invalid_api_key")
        assert await ask({}) == (401, "invalid_api_key")
        assert (await web.get("/v1/models", headers={"authorization": "Bearer sk-plain"})).json()["data"] == []
        assert (await web.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "entry", [ApiKey(), ApiKey(key="a", sha256="b"), ApiKey(key=""), ApiKey(sha256="abc")], ids=repr
)
def test_keys_that_cannot_be_are_refused(entry: ApiKey) -> None:
    with pytest.raises(ConfigurationError, match="'team'"):
        KeyTable({"team": entry})


def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("[team]\nkeys = 1", "no toml", "[team]\nkey = 1"):
        (tmp_path / "keys.toml").write_text(text)
        with pytest.raises(ConfigurationError, match=r"keys\.toml"):
            read_keys(tmp_path / "keys.toml")


async def test_each_key_is_the_client_of_the_fabric_that_it_names() -> None:
    keys = KeyTable({"a": ApiKey(key="sk-a"), "b": ApiKey(key="sk-b", fabric_key="/keys/b.key_secret")})
    clients: dict[str | None, AsyncClient] = {}
    async with serving(EchoWorker()) as fabric:

        def connect(identity: str | None) -> AsyncClient:
            clients[identity] = AsyncClient(fabric.endpoint)
            return clients[identity]

        async with (
            Gateway(GatewayConfig(port=0, keys=keys), connect) as made,
            httpx.AsyncClient(base_url=made.url) as web,
        ):

            async def ask(secret: str) -> int:
                headers = {"authorization": f"Bearer {secret}"}
                return (await web.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code

            assert set(clients) == {None, "/keys/b.key_secret"}
            assert (await ask("sk-a"), await ask("sk-b")) == (200, 200)
            await clients["/keys/b.key_secret"].close()
            assert (await ask("sk-a"), await ask("sk-b")) == (200, 503)


async def test_keys_change_while_streams_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEYS_LOOK_MS", 1)
    file = tmp_path / "keys.toml"
    file.write_text('[old]\nkey = "sk-old"\n')
    slow = Slow()
    async with (
        gateway(EchoWorker(), slow, keys=read_keys(file)) as served,
        httpx.AsyncClient(base_url=served.url, timeout=30) as web,
    ):
        told: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        keys = WatchedFile(
            file, read_keys, served.gateway.take_keys, lambda event, **fields: told.put_nowait((event, fields))
        )
        keys.read()
        watching = asyncio.create_task(keys.watch())

        async def ask(secret: str) -> int:
            return (
                await web.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {secret}"})
            ).status_code

        async def change(text: str) -> tuple[str, dict[str, Any]]:
            # As whoever writes files well: in one step.
            (tmp_path / "new").write_text(text)
            (tmp_path / "new").replace(file)
            return await told.get()

        async with asyncio.timeout(30):
            assert await told.get() == ("keys", {"path": str(file), "keys": 1})
            headers, asked = {"authorization": "Bearer sk-old"}, {**CHAT, "model": "slow", "stream": True}
            async with web.stream("POST", "/v1/chat/completions", json=asked, headers=headers) as response:
                assert (await change('[new]\nkey = "sk-new"\n'))[0] == "keys"
                assert (await ask("sk-old"), await ask("sk-new")) == (401, 200)
                event, fields = await change("no toml")
                assert (event, str(file) in fields["error"]) == ("keys_kept", True)
                event, fields = await change('[new]\nkey = "sk-new"\nfabric_key = "/no/such"\n')
                assert event == "keys"
                slow.go_on.set()
                assert "[DONE]" in (await response.aread()).decode()
            file.unlink()
            assert (await told.get())[0] == "keys_kept"
            assert (await ask("sk-old"), await ask("sk-new")) == (401, 200)
        watching.cancel()


async def test_pages_of_named_origins_may_call() -> None:
    origin = "https://chat.example.org"
    async with gateway(EchoWorker(), cors_origins=(origin,)) as served, httpx.AsyncClient(base_url=served.url) as web:
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        first = await web.options("/v1/chat/completions", headers={"origin": origin, **asking})
        assert (first.status_code, first.headers["access-control-allow-origin"]) == (204, origin)
        assert first.headers["access-control-allow-headers"] == "authorization"
        asked = await web.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
        assert asked.headers["access-control-allow-origin"] == origin
        other = await web.options("/v1/chat/completions", headers={"origin": "https://evil.example.org", **asking})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_goes_away_stops_the_engine(stream: bool) -> None:
    slow = Slow(silent=not stream)
    async with gateway(slow) as served, httpx.AsyncClient(base_url=served.url) as web:
        asking = asyncio.create_task(web.post("/v1/chat/completions", json={**CHAT, "model": "slow", "stream": stream}))
        async with asyncio.timeout(10):
            await slow.begun.wait()
            asking.cancel()
            await slow.stopped.wait()
            figures = served.gateway.figures
            while not figures.disconnects:
                await asyncio.sleep(0)
        assert figures.requests == {("/v1/chat/completions", "other", 499): 1}
        assert (figures.disconnects, figures.streams) == (1, 0)
        assert served.logged == [("listening", {"endpoint": served.url})]


async def test_a_long_prefill_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "KEEP_ALIVE_MS", 20)
    slow = Slow(silent=True)
    async with gateway(slow) as served, httpx.AsyncClient(base_url=served.url, timeout=10) as web:
        asked = {**CHAT, "model": "slow", "stream": True}
        async with web.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(3)] == [": keep-alive", "", ": keep-alive"]
            slow.go_on.set()
            rest = [line async for line in lines if line.startswith("data: ")]
        assert '"content":"done"' in rest[-2]
        assert rest[-1] == "data: [DONE]"


async def test_a_caller_who_does_not_read_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer ends when too much waits for it; others are served meanwhile."""
    monkeypatch.setattr(http, "UNSENT_BYTES_MAX", 100_000)
    async with gateway(EchoWorker()) as served:
        # Long words fill the kernel's buffers soon.
        asked = {"model": "echo", "prompt": "w" * 10_000, "stream": True, "max_tokens": 900_000}
        body = httpx.Request("POST", f"{served.url}/v1/completions", json=asked)
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        place.setblocking(False)
        await asyncio.get_running_loop().sock_connect(place, ("127.0.0.1", int(served.url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=place, limit=1_024)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body.content)
        writer.write(head + body.content)
        async with asyncio.timeout(30):
            while (await served.fabric.status()).in_flight == 0:
                await asyncio.sleep(0.01)
            while (await served.fabric.status()).in_flight:
                answer = await served.openai.chat.completions.create(model="echo", messages=CHAT["messages"])
                assert answer.choices[0].message.content == "one two "
        writer.close()
        del reader


async def test_a_drain_lets_what_runs_end() -> None:
    slow = Slow()
    async with gateway(slow) as served, httpx.AsyncClient(base_url=served.url, timeout=10) as web:
        asked = {**CHAT, "model": "slow", "stream": True}
        async with web.stream("POST", "/v1/chat/completions", json=asked) as response:
            draining = asyncio.create_task(served.gateway.drain())
            with contextlib.suppress(ConnectionError):
                while True:
                    (await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2])))[1].close()
            assert not draining.done()
            slow.go_on.set()
            assert "[DONE]" in (await response.aread()).decode()
        await draining
        with pytest.raises(httpx.ConnectError):
            await web.get("/health")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_of_the_gateway_ends_one_answer_and_no_other(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(*_: Any) -> bytes:
        raise ZeroDivisionError("a fault")

    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        with monkeypatch.context() as patched:
            patched.setattr(chat.ChatWording, "delta" if stream else "whole", fail)
            broken = await web.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "backend")
        assert "a fault" in broken.json()["error"]["message"]
        assert (await web.post("/v1/chat/completions", json={**CHAT, "stream": stream})).status_code == 200
        assert "internal_error" in [event for event, _ in served.logged]


async def test_a_reader_that_fails_ends_what_runs_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        read = AnswerReader.read
        failed = [False]

        async def fails_once(reader: AnswerReader) -> Any:
            found = await read(reader)
            if not failed[0]:
                failed[0] = True
                raise ZeroDivisionError("a fault")
            return found

        monkeypatch.setattr(AnswerReader, "read", fails_once)
        # The task that waits in the former method reads one answer more.
        codes = [(await web.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(4)]
        assert sorted(codes) == [200, 200, 200, 500]
