"""The page of live figures beside a controller's metrics: three files and one JSON document, all read-only."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from zfabric.limits import SCRAPE_MS
from zfabric.monitoring.live import LiveView

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

_FILES: Final = {
    "/": ("live.html", "text/html; charset=utf-8"),
    "/live.css": ("live.css", "text/css; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
}
#: Nothing from elsewhere, nothing in another's frame; names of workers and models are others' texts.
_HEADERS: Final = [
    ("Content-Security-Policy", "default-src 'self'; img-src data:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]


def with_pages(view: LiveView) -> Callable[[WSGIApplication], WSGIApplication]:
    """Puts the page in front of an application that serves metrics, which keeps all other paths.

    Args:
        view: Asked on the loop that runs now, from whatever thread serves.
    """
    loop = asyncio.get_running_loop()
    files = {path: (_read(name), kind) for path, (name, kind) in _FILES.items()}

    def document(environ: dict[str, Any]) -> bytes:
        asked = asyncio.run_coroutine_threadsafe(view.document(_since(environ)), loop)
        return asked.result(SCRAPE_MS / 1_000)

    def around(metrics: WSGIApplication) -> WSGIApplication:
        def application(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO") or "/"
            if path != "/live.json" and path not in files:
                return metrics(environ, start_response)
            if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
                start_response("405 Method Not Allowed", [("Allow", "GET, HEAD"), ("Content-Length", "0")])
                return []
            body, kind = files[path] if path in files else (document(environ), "application/json")
            start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS])
            return [body] if environ["REQUEST_METHOD"] == "GET" else []

        return application

    return around


def _read(name: str) -> bytes:
    return resources.files("zfabric.monitoring").joinpath("page", name).read_bytes()


def _since(environ: dict[str, Any]) -> float:
    """The time in the query; all samples where there is none that is a number."""
    [text, *_] = parse_qs(environ.get("QUERY_STRING", "")).get("since", ["0"])
    try:
        since = float(text)
    except ValueError:
        return 0.0
    return since if math.isfinite(since) else 0.0
