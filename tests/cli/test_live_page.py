"""The page of live figures beside a controller's metrics, as HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.fabric import Fabric, echo_fabric
from zfabric import AsyncClient
from zfabric.cli.metrics import metrics_at
from zfabric.limits import LIVE_ROWS_MAX, LIVE_SLICE_ROWS
from zfabric.monitoring import live
from zfabric.monitoring.history import History


@contextlib.asynccontextmanager
async def served(ipc: str, workers: int = 2) -> AsyncIterator[tuple[Fabric, AsyncClient, str]]:
    """A fabric whose controller serves the page, and its address."""
    async with echo_fabric(ipc, workers=workers) as (made, client):
        with metrics_at("0", "controller", made.controller) as told:
            yield made, client, urlsplit(told["metrics"]).netloc


async def fetched(address: str, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    def ask() -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(address, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    return await asyncio.to_thread(ask)


async def test_the_document_says_what_queries_say(ipc: str) -> None:
    async with served(ipc) as (_, client, address):
        await client.generate("echo", "a", max_new_tokens=3)
        status, headers, body = await fetched(address, "/live.json")
        assert status == 200
        assert headers["Content-Type"] == "application/json"
        document = msgspec.json.decode(body)
        assert [row["name"] for row in document["workers"]] == [row.name for row in await client.workers()]
        assert [row["name"] for row in document["models"]] == [row.name for row in await client.models()]
        assert document["status"]["completed"] == (await client.status()).completed == 1
        assert all(row["silence_ms"] >= 0 for row in document["workers"])
        assert document["left_out"] == {"models": 0, "workers": 0}


async def test_samples_are_what_happened_and_come_once(ipc: str) -> None:
    async with echo_fabric(ipc) as (made, client):
        history = History(made.controller.broker)
        first = history.take()
        for _ in range(5):
            await client.generate("echo", "a", max_new_tokens=1)
        second = history.take()
        assert second.requests > 0 == first.requests
        assert second.failures == second.queued == second.running == 0
        assert history.since(0.0)[-2:] == [first, second]
        assert history.since(first.at) == [second]
        assert history.since(second.at) == []
        history.stop()


@pytest.mark.parametrize("path", ["/", "/live.css", "/live.js"])
async def test_its_files_bring_nothing_from_elsewhere(ipc: str, path: str) -> None:
    async with served(ipc) as (_, _, address):
        status, headers, body = await fetched(address, path)
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert b"://" not in body
        status, headers, empty = await fetched(address, path, "HEAD")
        assert (status, empty, int(headers["Content-Length"])) == (200, b"", len(body))
        assert (await fetched(address, path, "POST"))[0] == 405


async def test_metrics_stay_where_they_are(ipc: str) -> None:
    async with served(ipc) as (_, _, address):
        status, _, body = await fetched(address, "/metrics")
        assert status == 200
        assert b"zfabric_workers" in body


@pytest.mark.parametrize("query", ["since=", "since=x", "since=nan", "since=1e999", "since=-1", "other=1", "%ff"])
async def test_a_strange_time_is_no_error(ipc: str, query: str) -> None:
    async with served(ipc) as (_, _, address):
        assert (await fetched(address, f"/live.json?{query}"))[0] == 200


async def test_many_rows_give_way_to_others_and_have_a_bound() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    rows = await live._rows(range(LIVE_ROWS_MAX + 10), lambda number: number)
    beside.cancel()
    assert rows == list(range(LIVE_ROWS_MAX))
    assert turns >= LIVE_ROWS_MAX // LIVE_SLICE_ROWS
