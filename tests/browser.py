"""A real Chromium without a window, for pages that the project serves."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright

from tools.bootstrap import BROWSERS

#: Nothing but the page: a browser of a test asks nobody for updates, and root has to do without its sandbox.
_FLAGS: Final = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
#: Enough for a browser on a busy machine; what never comes ends the test.
_LIMIT_MS: Final = 30_000


def executable() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    executable() is None, reason="there is no Chromium: install it with the system's package manager"
)


@contextlib.asynccontextmanager
async def browsing(width: int = 1_200, height: int = 800) -> AsyncIterator[Page]:
    """An empty page of a fresh profile. At the end the page's own errors and messages of errors fail the test.

    Answers of a server with an error's status are no errors of a page, though browsers say them as such.
    """
    wrong: list[str] = []
    async with async_playwright() as driver:
        with tempfile.TemporaryDirectory(prefix="zf-browser-") as profile:
            context = await driver.chromium.launch_persistent_context(
                profile, executable_path=executable(), headless=True, args=list(_FLAGS),
                viewport={"width": width, "height": height},
            )  # fmt: skip
            context.set_default_timeout(_LIMIT_MS)
            page = context.pages[0]
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
            yield page
            await context.close()
    assert [said for said in wrong if "Failed to load resource" not in said] == []


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Page]:
    """The page of a fresh browser."""
    async with browsing() as page:
        yield page
