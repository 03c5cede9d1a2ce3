"""One call of an API, as its module gets it, and the table of what there is to call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from zfabric.client.aio import AsyncClient
from zfabric.errors import FabricError
from zfabric.gateway.errors import error_body
from zfabric.gateway.fabric import FabricClient
from zfabric.gateway.http import Headers, Receive, Response
from zfabric.gateway.keys import ApiKey


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
        gone: Whether the caller went away.
    """

    id: str
    headers: dict[bytes, bytes]
    body: bytes
    path: str
    receive: Receive
    response: Response
    fabric: FabricClient
    key: ApiKey | None
    gone: bool = False

    @property
    def client(self) -> AsyncClient:
        """The caller's client of the fabric, for what is no stream."""
        return self.fabric.client

    def check_model(self, model: str) -> str:
        """The model, if the caller may ask for it. Raises: UnknownModelError."""
        if self.key is not None:
            self.key.check_model(model)
        return model


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something to call.

    Attributes:
        method: "GET" or "POST".
        path: Exactly; or what it begins with, where it ends with "/".
        handle: Answers a call. FabricErrors that it raises before anything was said are worded by `errors`.
        errors: The body of an error with its status, in the API's own form.
    """

    method: str
    path: str
    handle: Callable[[Call], Awaitable[None]]
    errors: Callable[[FabricError, int], bytes] = field(default=error_body)


__all__ = ["Call", "Endpoint", "Headers"]
