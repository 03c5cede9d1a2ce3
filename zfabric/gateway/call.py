"""One call of an API, as its module gets it, and the table of what there is to call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from zfabric.client.aio import AsyncClient
from zfabric.errors import FabricError, RequestCancelledError
from zfabric.gateway.errors import error_body, status_of
from zfabric.gateway.fabric import FabricClient
from zfabric.gateway.figures import Figures
from zfabric.gateway.http import Receive, Response
from zfabric.gateway.keys import ApiKey

T = TypeVar("T")


@dataclass(slots=True)
class Call:
    """One HTTP request that was let in.

    Attributes:
        id: Its name, of the header X-Request-Id or of the gateway's own making.
        headers: Names in lower case.
        body: All of it.
        path: What stands in the path after the endpoint's own, where that ends with "/".
        receive: ASGI's; it tells that the caller went away.
        response: Where the answer goes.
        fabric: The caller's client of the fabric.
        key: The caller's entry in the file of keys, None where there is no file.
        figures: What this process counts.
        begun_ns: When the request came, by the monotonic clock.
        model: What was asked for, once that is known.
        gone: Whether the caller went away.
        broke: What ended a stream that had begun.
    """

    id: str
    headers: dict[bytes, bytes]
    body: bytes
    path: str
    receive: Receive
    response: Response
    fabric: FabricClient
    key: ApiKey | None
    figures: Figures
    begun_ns: int
    model: str = ""
    gone: bool = False
    broke: FabricError | None = None

    @property
    def client(self) -> AsyncClient:
        """The caller's client of the fabric, for what is no stream."""
        return self.fabric.client

    def check_model(self, model: str) -> str:
        """The model, if the caller may ask for it. Raises: UnknownModelError."""
        self.model = model
        if self.key is not None:
            self.key.check_model(model)
        return model

    async def left(self) -> None:
        """Until the caller went away, or has its response."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def unless_left(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives; it is cancelled, and with it what it asks of the fabric, when the caller goes away.

        Raises:
            RequestCancelledError: The caller went away.
        """
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self.left())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            self.gone = True
            raise RequestCancelledError("the caller closed the connection")
        finally:
            working.cancel()
            leaving.cancel()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something to call.

    Attributes:
        method: "GET" or "POST".
        path: Exactly; or what it begins with, where it ends with "/".
        handle: Answers a call. FabricErrors that it raises before anything was said are worded by `errors`.
        errors: The body of an error with its status and the request's name, in the API's own form.
        status: The status of an error, as the API has it.
        name_header: What the API calls the header with the request's name, beside X-Request-Id.
    """

    method: str
    path: str
    handle: Callable[[Call], Awaitable[None]]
    errors: Callable[[FabricError, int, str], bytes] = field(default=error_body)
    status: Callable[[FabricError], int] = field(default=status_of)
    name_header: bytes | None = None
