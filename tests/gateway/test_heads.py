"""Heads of requests that are too large, never whole, or say what is not done."""

from __future__ import annotations

import asyncio
import contextlib
import gzip

import httpx2
import pytest

from tests.gateway.conftest import gateway
from zfabric.backends.echo import EchoWorker
from zfabric.gateway import protocol
from zfabric.limits import HEAD_BYTES_MAX

BEGIN = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"


async def answered(url: str, *parts: bytes) -> bytes:
    """All that a server says to bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    said = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        said = await reader.read(-1)
    writer.close()
    return said


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
async def test_a_head_without_end_is_not_kept(end: bytes) -> None:
    async with gateway(EchoWorker()) as served, asyncio.timeout(20):
        for begin in (BEGIN + b"A: ", BEGIN + b"A", b"GET /"):
            await answered(served.url, begin, *[b"a" * 4_096] * (20 * HEAD_BYTES_MAX // 4_096), end)
        for _ in range(2):
            assert await served.openai.models.list()


async def test_a_large_head_that_is_allowed_is_taken() -> None:
    async with gateway(EchoWorker()) as served, asyncio.timeout(20):
        large = b"A: " + b"a" * (HEAD_BYTES_MAX // 2) + b"\r\n"
        told = await answered(served.url, BEGIN + large, b"\r\n", BEGIN + large + b"Connection: close\r\n\r\n")
    assert told.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("sent", [b"", BEGIN])
async def test_a_head_that_never_comes_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_PAUSE_MS", 50)
    async with gateway(EchoWorker()) as served, asyncio.timeout(20):
        assert await answered(served.url, sent) == b""


async def test_neither_is_a_later_one_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(EchoWorker()) as served, asyncio.timeout(20):
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(BEGIN + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(protocol, "BODY_PAUSE_MS", 50)
        writer.write(BEGIN)
        assert b"HTTP/1.1" not in await reader.read(-1)
        writer.close()


async def test_a_compressed_body_is_refused_by_name() -> None:
    async with gateway(EchoWorker()) as served, httpx2.AsyncClient() as web:
        for body in (gzip.compress(b"{}"), b"{}"):
            said = await web.post(
                f"{served.url}/v1/chat/completions", content=body, headers={"content-encoding": "gzip"}
            )
            assert said.status_code == 400
            assert "'gzip'" in said.json()["error"]["message"]
