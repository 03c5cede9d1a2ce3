"""The page of live figures beside a controller's metrics, as HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec
import pytest
from playwright.async_api import Page, expect

from tests.browser import browser, needs_browser
from tests.fabric import Fabric, echo_fabric, fabric
from zfabric import AsyncClient
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.cli.metrics import metrics_at
from zfabric.limits import LIVE_ROWS_MAX, LIVE_SLICE_ROWS
from zfabric.monitoring import live
from zfabric.monitoring.history import History

__all__ = ["browser"]


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
        assert document["left_out"] == {"models": 0, "queue": 0, "workers": 0}


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


@needs_browser
async def test_a_browser_shows_what_is_there_and_follows_it(ipc: str, browser: Page) -> None:
    async with fabric(ipc) as made, AsyncClient(ipc) as client:
        await made.add_worker("<b>w0</b>", EchoWorker(), slots=1)
        await made.add_worker("w1", EchoWorker(EchoOptions(model_names=("other",))), slots=3)
        with metrics_at("0", "controller", made.controller) as told:
            await browser.goto(told["metrics"].removesuffix("metrics"))
            workers = browser.locator("#workers tbody tr td:first-child")
            await expect(workers).to_have_text(["<b>w0</b>", "w1"])
            await browser.get_by_role("button", name="slots").last.click()
            await expect(workers).to_have_text(["w1", "<b>w0</b>"])
            await browser.get_by_role("searchbox").fill("other")
            await expect(workers).to_have_text(["w1"])
            streams = [client.stream("echo", "a", max_new_tokens=10_000_000) for _ in range(2)]
            await anext(streams[0])
            await browser.get_by_role("searchbox").fill("")
            await expect(browser.locator("#queue tbody")).to_contain_text("slot")
            await expect(browser.locator("#figures")).to_contain_text("1running")
            assert await browser.locator("canvas").count() == 3
            for stream in streams:
                await stream.aclose()
            await expect(browser.locator("#queue tbody")).to_contain_text("nothing waits")
        await expect(browser.locator("#trouble")).to_contain_text("The controller does not answer")
