"""The ASGI application: who may call, what there is to call, and how errors leave."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final

from zfabric.client.traces import below
from zfabric.errors import (
    BackendError,
    FabricError,
    UnsupportedOperationError,
)
from zfabric.gateway import (
    chat,
    completions,
    embeddings,
    messages,
    models,
    native,
    pooling,
    ranking,
    responses,
    tokens,
    tokenwise,
    transcriptions,
)
from zfabric.gateway.call import Call, Endpoint
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.cors import Cors
from zfabric.gateway.errors import error_body, headers_of, status_of
from zfabric.gateway.fabric import FabricClient
from zfabric.gateway.figures import OTHER, Figures
from zfabric.gateway.http import Receive, Response, Scope, Send, read_body
from zfabric.gateway.keys import ApiKey
from zfabric.gateway.page import chat_page
from zfabric.gateway.sse import encode
from zfabric.limits import READY_TIMEOUT_MS

#: All APIs. Another one is a module beside these with ENDPOINTS of its own.
ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    *chat.ENDPOINTS,
    *completions.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *messages.ENDPOINTS,
    *models.ENDPOINTS,
    *native.ENDPOINTS,
    *pooling.ENDPOINTS,
    *ranking.ENDPOINTS,
    *responses.ENDPOINTS,
    *tokenwise.ENDPOINTS,
    *tokens.ENDPOINTS,
    *transcriptions.ENDPOINTS,
)

#: Names of requests that are taken from callers: they end up in logs and headers.
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class Application:
    """What the server calls for each HTTP request.

    Args:
        config: How it was started.
        fabrics: A client of the fabric for each identity of the file of keys; None is the gateway's own.
        log: Called with an event and its fields.

    Attributes:
        draining: Whether it is about to end: no longer ready, but what comes is still answered.
        figures: What it counts.
        keys: Who may call; None for everybody. Calls that run go on when it changes.
    """

    def __init__(
        self, config: GatewayConfig, fabrics: dict[str | None, FabricClient], log: Callable[..., Any],
        endpoints: Iterable[Endpoint] = ENDPOINTS,
    ) -> None:  # fmt: skip
        self.draining = False
        self.figures = Figures()
        self.keys = config.keys
        self._config = config
        self._fabrics = fabrics
        self._log = log
        self._cors = Cors(config.cors_origins)
        self._exact: dict[str, dict[str, Endpoint]] = {}
        self._prefixes: list[Endpoint] = []
        for endpoint in endpoints:
            if endpoint.path.endswith("/"):
                self._prefixes.append(endpoint)
            else:
                self._exact.setdefault(endpoint.path, {})[endpoint.method] = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = _request_id(headers)
        origin = headers.get(b"origin")
        shown = [(b"x-request-id", request_id.encode()), *(self._cors.headers(origin) if origin else ())]
        response = Response(send, shown)
        endpoint: Endpoint | None = None
        call: Call | None = None
        begun_ns = time.monotonic_ns()
        try:
            if origin and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await response.whole(204 if self._cors.allows(origin) else 403, b"", self._cors.preflight(headers))
                return
            if await self._probed(scope["path"], response) or await self._page(scope, response):
                return
            found = self._find(scope["method"], scope["path"])
            if isinstance(found, int):
                await self._refuse(found, scope, response)
                return
            endpoint, rest = found
            if endpoint.name_header is not None:
                response.headers.append((endpoint.name_header, request_id.encode()))
            # Who may not call is told so before anything of the body is read.
            key = self._admit(headers)
            _check_encoding(headers)
            body = await read_body(receive, headers, self._config.body_limit) if endpoint.method == "POST" else b""
            fabric = self._fabrics[key.fabric_key if key is not None else None]
            call = Call(request_id, headers, body, rest, receive, response, fabric, key, self.figures, begun_ns)
            with below(_trace_headers(headers)):
                await endpoint.handle(call)
        except FabricError as error:
            await self._failed(error, endpoint, request_id, response)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 — a fault of one call is told to its caller, and ends nothing else
            self._log("internal_error", request=request_id, exc_info=error)
            told = BackendError(f"the gateway failed: {type(error).__name__}: {error}")
            await self._failed(told, endpoint, request_id, response)
        finally:
            self._count(endpoint, call, response, begun_ns)

    def _count(self, endpoint: Endpoint | None, call: Call | None, response: Response, begun_ns: int) -> None:
        """Count a request that has ended. Probes are none."""
        figures = self.figures
        figures.sent_bytes += response.body_bytes
        model, status = "", response.status
        if call is not None:
            model = call.model
            figures.received_bytes += len(call.body)
            if call.gone:
                status = 499
            elif call.broke is not None:
                status = status_of(call.broke)
        # Also where the caller went before all of its body had come.
        figures.disconnects += status == 499
        if status and (endpoint is not None or status >= 400):
            path = endpoint.path if endpoint is not None else OTHER
            figures.ended(path, model, status, time.monotonic_ns() - begun_ns)

    def _find(self, method: str, path: str) -> tuple[Endpoint, str] | int:
        """The endpoint, and what follows it in the path; or the status of there being none."""
        here = self._exact.get(path)
        if here is not None:
            found = here.get(method)
            return (found, "") if found is not None else 405
        for endpoint in self._prefixes:
            if path.startswith(endpoint.path) and len(path) > len(endpoint.path):
                return (endpoint, path[len(endpoint.path) :]) if endpoint.method == method else 405
        return 404

    async def _refuse(self, status: int, scope: Scope, response: Response) -> None:
        method, path = scope["method"], scope["path"]
        told = f"there is no {path}" if status == 404 else f"{path} does not take {method}"
        allowed = ", ".join(sorted(self._exact.get(path, {"GET": None})))
        headers = [(b"allow", allowed.encode())] if status == 405 else []
        await response.whole(status, error_body(UnsupportedOperationError(told, path=path), status), headers)

    async def _probed(self, path: str, response: Response) -> bool:
        """Answer those who look whether this process is alive, and whether requests should come here. Needs no key."""
        if path == "/health":
            await response.whole(200, b"{}")
            return True
        if path != "/ready":
            return False
        try:
            models = await self._fabrics[None].client.models(timeout=READY_TIMEOUT_MS / 1_000)
        except FabricError as error:
            await response.whole(503, encode({"ready": False, "why": error.message}))
            return True
        why = "the gateway drains" if self.draining else None if models else "nobody serves a model"
        told = {"ready": why is None, "why": why, "models": [model.name for model in models]}
        await response.whole(200 if why is None else 503, encode(told))
        return True

    async def _page(self, scope: Scope, response: Response) -> bool:
        """Answer a browser that asks for the chat page. Needs no key: what the page calls does."""
        if not self._config.chat_page or scope["path"] != "/" or scope["method"] not in ("GET", "HEAD"):
            return False
        page, headers = chat_page()
        await response.whole(200, page, headers, b"text/html; charset=utf-8")
        return True

    def _admit(self, headers: dict[bytes, bytes]) -> ApiKey | None:
        """The caller's entry. Raises: AuthenticationError."""
        if self.keys is None:
            return None
        authorization = headers.get(b"authorization")
        if authorization is None and b"x-api-key" in headers:
            authorization = b"Bearer " + headers[b"x-api-key"]
        return self.keys.find(authorization)[1]

    async def _failed(self, error: FabricError, endpoint: Endpoint | None, request_id: str, response: Response) -> None:
        status = endpoint.status(error) if endpoint is not None else status_of(error)
        if status >= 500:
            self._log("request_failed", request=request_id, status=status, code=error.code, error=error.message)
        if response.started:
            return
        word = endpoint.errors if endpoint is not None else error_body
        await response.whole(status, word(error, status, request_id), headers_of(error))


def _check_encoding(headers: dict[bytes, bytes]) -> None:
    """Raises: UnsupportedOperationError: The body is compressed."""
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        told = encoding[:64].decode("latin-1")
        raise UnsupportedOperationError(f"bodies are taken as they are, not in the encoding {told!r}", encoding=told)


def _trace_headers(headers: dict[bytes, bytes]) -> dict[str, str]:
    """W3C trace context, as far as the caller has sent it."""
    given = ((name, headers.get(name, b"")) for name in (b"traceparent", b"tracestate"))
    return {name.decode(): value.decode("latin-1") for name, value in given if value}


def _request_id(headers: dict[bytes, bytes]) -> str:
    """What the caller calls its request, if that can be a name; else one of the gateway's own."""
    given = headers.get(b"x-request-id", b"")
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
