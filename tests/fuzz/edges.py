"""Doors at the fabric's edges: bodies of HTTP at the gateway, results and answers at the client library, recordings on disk."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NoReturn

from msgspec import Raw

from zfabric.client.aio import AsyncClient
from zfabric.client.requests import generate_request
from zfabric.core.client.bodies import encoded
from zfabric.errors import ClosedError, ConfigurationError, FabricError
from zfabric.gateway.app import ENDPOINTS, Application
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.fabric import FabricClient, Sink
from zfabric.limits import FRAME_BYTES_MAX
from zfabric.recording.arrivals import requests_of
from zfabric.recording.reader import read_recordings
from zfabric.recording.timeline import Filter, as_row, details_of
from zfabric.wire.answers import Outcome

#: Paths that take a body, in the order in which an input's first byte chooses among them.
PATHS: Final = tuple(sorted(endpoint.path for endpoint in ENDPOINTS if endpoint.method == "POST"))
#: What stands between the fields of a form.
BOUNDARY: Final = b"between"
_ENDPOINT: Final = "ipc:///nowhere/at-all"


class _Fabric(FabricClient):
    """A fabric that is not there: requests are made and encoded, and go nowhere."""

    def stream(self, sink: Sink, model: str, prompt: str | None, options: dict[str, Any]) -> NoReturn:
        request, _ = generate_request(prompt, options)
        encoded(request, FRAME_BYTES_MAX)
        raise ClosedError("nobody is there")


@functools.cache
def _gateway() -> tuple[Application, asyncio.AbstractEventLoop, list[Any]]:
    failures: list[Any] = []

    def log(event: str, **fields: Any) -> None:
        if event == "internal_error":
            failures.append(fields["exc_info"])

    fabric = _Fabric(AsyncClient(_ENDPOINT), log)
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return Application(GatewayConfig(), {None: fabric}, log), loop, failures


def gateway(data: bytes) -> None:
    """A body of HTTP. The first byte says of which endpoint. It is refused, or becomes a request that the fabric would get."""
    application, loop, failures = _gateway()
    path = PATHS[data[0] % len(PATHS)] if data else PATHS[0]
    said: list[dict[str, Any]] = []
    taken = False

    async def receive() -> dict[str, Any]:
        nonlocal taken
        if taken:
            await asyncio.Event().wait()
        taken = True
        return {"type": "http.request", "body": data[1:], "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    form = [(b"content-type", b"multipart/form-data; boundary=" + BOUNDARY)] if "/audio/" in path else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": form}
    loop.run_until_complete(application(scope, receive, send))
    if failures:
        raise AssertionError(f"{path} made the gateway fail") from failures.pop()
    assert said[0]["type"] == "http.response.start"
    # Nobody is there: each API has its own word for that.
    assert said[0]["status"] < 500 or said[0]["status"] in (503, 529)


class _Connection:
    """Gives each call the same result."""

    def __init__(self, result: bytes) -> None:
        self._result = Raw(result)

    def check_open(self) -> None:
        """It is."""

    async def call(self, *_: Any, **__: Any) -> tuple[Any, None]:
        return SimpleNamespace(outcome=Outcome(result=self._result, labels=["a", "b"])), None

    async def ask(self, *_: Any) -> list[Raw]:
        return [self._result]


#: What a client may ask that has a result of its own form.
CALLS: Final[tuple[Callable[[AsyncClient], Coroutine[Any, Any, object]], ...]] = (
    lambda client: client.embed("m", ["a", "b"]),
    lambda client: client.embed_tokens("m", ["a", "b"]),
    lambda client: client.count_tokens("m", "a"),
    lambda client: client.tokenize("m", "a"),
    lambda client: client.detokenize("m", [1, 2]),
    lambda client: client.rerank("m", "a", ["b", "c"]),
    lambda client: client.classify("m", ["a", "b"]),
    lambda client: client.reward("m", ["a", "b"]),
    lambda client: client.operate("w", "call"),
    lambda client: client.models(),
    lambda client: client.model_details("m"),
    lambda client: client.workers(),
    lambda client: client.status(),
    lambda client: client.requests(),
    lambda client: client.clients(),
    lambda client: client.queue(),
    lambda client: client.refresh(),
    lambda client: client.settings(),
)


def results(data: bytes) -> None:
    """The result of a call, or the answer to a question. The first byte says of which."""
    call = CALLS[data[0] % len(CALLS)] if data else CALLS[0]
    client = AsyncClient(_ENDPOINT)
    client._connection = _Connection(data[1:])  # type: ignore[assignment]
    with contextlib.suppress(FabricError):
        _done(call(client))


def _done(work: Coroutine[Any, Any, object]) -> object:
    """What a coroutine gives that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call waits for something")


def recording(data: bytes) -> None:
    """A recording on disk, as `zfabric show` and the simulator read it."""
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(ConfigurationError):
        file = Path(directory, "recording")
        file.write_bytes(data)
        events = read_recordings([file]).events
        for event in Filter().of(events):
            as_row(event, events[0].unix_ns)
            details_of(event)
        requests_of(events)
