"""The chat page, in a real browser."""

from __future__ import annotations

import httpx
from playwright.async_api import Page, expect

from tests.browser import browser, needs_browser
from tests.gateway.backends import Slow
from tests.gateway.conftest import gateway
from zfabric.backends.echo import EchoOptions, EchoWorker
from zfabric.gateway.keys import ApiKey, KeyTable

__all__ = ["browser"]


async def test_the_page_needs_nothing_from_elsewhere_and_can_be_left_out() -> None:
    async with gateway(EchoWorker()) as served, httpx.AsyncClient(base_url=served.url) as web:
        page = await web.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'")
        assert policy.count("'sha256-") == 2
        assert "http" not in page.text.replace("http-equiv", "")
        assert (await web.post("/")).status_code == 404
    async with gateway(EchoWorker(), chat_page=False) as served, httpx.AsyncClient(base_url=served.url) as web:
        assert (await web.get("/")).status_code == 404


@needs_browser
async def test_a_chat_streams_goes_on_and_is_forgotten(browser: Page) -> None:
    async with gateway(EchoWorker(EchoOptions(model_names=("echo", "nick")))) as served:
        await browser.goto(served.url)
        assert await browser.get_by_label("Model").locator("option").all_inner_texts() == ["echo", "nick"]
        await browser.get_by_label("Model").select_option("nick")
        await browser.get_by_label("Longest answer").fill("5")
        message = browser.get_by_label("Message")
        await message.fill("one two three")
        await message.press("Enter")
        answers = browser.locator(".assistant .said")
        await expect(answers).to_have_text(["one two three one two "], use_inner_text=False)
        await expect(browser.locator(".assistant")).to_contain_text("3 tokens read, 5 written")
        await expect(browser.locator(".assistant h2")).to_have_text("nick")
        await message.fill("<b>four</b>")
        await browser.get_by_role("button", name="Send").click()
        await expect(answers).to_have_count(2)
        # What is said is text, whatever it looks like; and the model was told all of the conversation.
        await expect(browser.locator(".user .said").last).to_have_text("<b>four</b>")
        await expect(browser.locator(".assistant").last).to_contain_text("written")
        assert await browser.locator("#log b").count() == 0
        await browser.get_by_role("button", name="New chat").click()
        await expect(answers).to_have_count(0)


@needs_browser
async def test_stop_cancels_in_the_engine(browser: Page) -> None:
    slow = Slow()
    async with gateway(slow) as served:
        await browser.goto(served.url)
        await browser.get_by_label("Message").fill("go on")
        await browser.get_by_role("button", name="Send").click()
        await expect(browser.locator(".assistant .said")).to_have_text("begun")
        await expect(browser.get_by_role("button", name="Send")).to_be_disabled()
        await browser.get_by_role("button", name="Stop").click()
        await slow.stopped.wait()
        await expect(browser.locator(".assistant")).to_contain_text("Stopped.")
        await expect(browser.get_by_role("button", name="Send")).to_be_enabled()


@needs_browser
async def test_errors_are_shown_and_a_key_mends_them(browser: Page) -> None:
    async with gateway(EchoWorker(EchoOptions(context_length=6)), keys=KeyTable({"a": ApiKey(key="sk-1")})) as served:
        await browser.goto(served.url)
        alert = browser.get_by_role("alert")
        await expect(alert).to_contain_text("401: an API key is needed")
        await browser.get_by_label("API key").fill("sk-1")
        await browser.get_by_label("API key").blur()
        await expect(browser.get_by_label("Model").locator("option")).to_have_text(["echo"])
        await expect(alert).to_have_count(0)
        await browser.get_by_label("System prompt").fill("a system prompt that is far too long for it")
        await browser.get_by_label("Message").fill("hello")
        await browser.get_by_label("Message").press("Enter")
        await expect(alert).to_contain_text("400: ")
        await expect(browser.locator(".assistant")).to_have_count(0)
