"""The server around the APIs: TLS, keys of the fabric, overload, the end, and what many streams cost."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme

from tests.fabric import Process, fabric, processes
from tests.gateway.backends import Slow
from tests.gateway.conftest import gateway
from tests.integration.test_access import KEYRING, NAMES
from tests.keys import guarded
from zfabric import AsyncClient
from zfabric.backends.echo import EchoWorker
from zfabric.cli.gateway import Link
from zfabric.errors import ConfigurationError
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.keys import ApiKey, KeyTable
from zfabric.gateway.server import Gateway
from zfabric.transport.curve import create_keys

CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two"}]}
#: Streams of the memory test, those before they are counted, and what each may cost.
STREAMS, FIRST, STREAM_BYTES_MAX = 2_000, 100, 40 * 1024


async def test_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with gateway(EchoWorker(), tls_cert=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem") as served:
        assert served.url.startswith("https://")
        async with httpx.AsyncClient(base_url=served.url, verify=trust) as web:
            answer = await web.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == "one two "
            stream = await web.post("/v1/chat/completions", json={**CHAT, "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient(base_url=served.url) as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get("/health")


async def test_files_that_are_no_certificate_are_told(tmp_path: Path) -> None:
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(ConfigurationError, match="tls_cert and tls_key cannot be used"):
        async with gateway(EchoWorker(), tls_cert=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem"):
            pass


async def test_a_fabric_key_has_the_fabrics_own_rules(ipc: str, tmp_path: Path) -> None:
    """Its holder may ask for what the controller's keyring allows, whatever the gateway's own key may."""
    for name in NAMES:
        create_keys(tmp_path, name)
    (tmp_path / "keyring.toml").write_text(KEYRING)
    keys = KeyTable(
        {"wide": ApiKey(key="sk-wide"), "narrow": ApiKey(key="sk-n", fabric_key=str(tmp_path / "narrow.key_secret"))}
    )
    async with guarded(ipc, tmp_path) as made:
        link = Link(
            endpoint=made.endpoint, key=tmp_path / "backend.key_secret", controller_key=tmp_path / "controller.key",
            transport=None,
        )  # fmt: skip
        async with (
            Gateway(GatewayConfig(port=0, keys=keys), link.connect) as door,
            httpx.AsyncClient(base_url=door.url) as web,
        ):

            async def ask(secret: str) -> tuple[int, str | None]:
                headers = {"authorization": f"Bearer {secret}"}
                told = await web.post("/v1/chat/completions", json=CHAT, headers=headers)
                return told.status_code, told.json().get("error", {}).get("code")

            assert await ask("sk-wide") == (200, None)
            assert await ask("sk-n") == (403, "permission_denied")


async def test_a_full_queue_says_when_to_come_back(ipc: str) -> None:
    slow = Slow()
    async with fabric(ipc, queue_depth_max=1) as made:
        await made.add_worker("w", slow, slots=1)
        async with (
            Gateway(GatewayConfig(port=0), lambda _: AsyncClient(made.endpoint)) as door,
            httpx.AsyncClient(base_url=door.url, timeout=30) as web,
        ):
            asked = {**CHAT, "model": "slow"}
            running = asyncio.create_task(web.post("/v1/chat/completions", json=asked))
            await slow.begun.wait()
            waiting = asyncio.create_task(web.post("/v1/chat/completions", json=asked))
            while not any(model.queue for model in made.controller.broker.registry.models.values()):
                await asyncio.sleep(0)
            refused = await web.post("/v1/chat/completions", json=asked)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            slow.go_on.set()
            assert [(await one).status_code for one in (running, waiting)] == [200, 200]


async def test_a_drain_ends_at_its_limit() -> None:
    slow = Slow()
    async with gateway(slow, drain_ms=1_000) as served, httpx.AsyncClient(base_url=served.url, timeout=30) as web:
        async with web.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "model": "slow", "stream": True}
        ) as response:
            await slow.begun.wait()
            await served.gateway.drain()
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "[DONE]" not in (await response.aread()).decode()
        await slow.stopped.wait()


async def test_what_open_streams_cost(ipc: str, run_directory: Path) -> None:
    """Streams that have begun and wait, as those of a slow engine or of a long answer do."""
    slow = Slow()
    body = b'{"model":"slow","messages":[{"role":"user","content":"one two"}],"stream":true}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with fabric(ipc) as made, processes(run_directory) as children:
        await made.add_worker("w", slow, slots=STREAMS)
        child = await Process.start("zfabric.cli.gateway", "--endpoint", ipc, "--port", "0", directory=run_directory)
        children.append(child)
        ready = dict(word.partition("=")[::2] for word in (await child.ready()).split()[1:])
        port = int(ready["url"].rpartition(":")[2])
        process = psutil.Process(child.process.pid)
        writers: list[asyncio.StreamWriter] = []

        async def begin() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            assert (await reader.readuntil(b'"begun "')).startswith(b"HTTP/1.1 200")
            writers.append(writer)

        async with asyncio.timeout(60):
            await asyncio.gather(*(begin() for _ in range(FIRST)))
            before = process.memory_info().rss
            for _ in range((STREAMS - FIRST) // FIRST):
                await asyncio.gather(*(begin() for _ in range(FIRST)))
            each = (process.memory_info().rss - before) / (STREAMS - FIRST)
            print(f"{each / 1024:.1f} KiB a stream")
            assert each <= STREAM_BYTES_MAX
            for writer in writers:
                writer.close()
            slow.go_on.set()
