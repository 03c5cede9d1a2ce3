"""One HTTP request and its response, on ASGI (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any, Final

from zfabric.errors import DeadlineExceededError, RequestCancelledError, TooLargeError
from zfabric.limits import BODY_PAUSE_MS, UNSENT_BYTES_MAX

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]
Headers = list[tuple[bytes, bytes]]

_EVENTS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would hold events back to fill its buffer.
    (b"x-accel-buffering", b"no"),
]


class Response:
    """What is said to a caller. Writing never waits, so one task can write to all callers.

    A server that takes a message at once is done with it in the same call, without a task of its own; one whose socket is
    full gets the rest from a task, in order.

    Args:
        send: ASGI's.
        headers: Of every response, such as the request's name.

    Attributes:
        headers: Those of every response; more may be added until a status is out.
        started: Whether a status is out.
        status: The one that is.
        body_bytes: Bytes of the body, so far.
        overflowed: Whether more waits for the caller than is kept for one that does not read.
        written_at: When something was last written, in seconds of the monotonic clock.
    """

    __slots__ = (
        "_send", "_sending", "_unsent", "_unsent_bytes", "body_bytes", "headers", "overflowed", "started", "status", "written_at",
    )  # fmt: skip

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self.headers = headers
        self._sending: asyncio.Task[None] | None = None
        self._unsent: deque[dict[str, Any]] = deque()
        self._unsent_bytes = 0
        self.started = False
        self.status = 0
        self.body_bytes = 0
        self.overflowed = False
        self.written_at = 0.0

    async def whole(
        self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = (), kind: bytes = b"application/json"
    ) -> None:
        """Send a response at once, and wait until the server has taken it."""
        size = str(len(body)).encode()
        self._start(status, [(b"content-type", kind), (b"content-length", size), *headers])
        self.write(body, more=False)
        await self.flushed()

    def start_events(self) -> None:
        """Begin a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
        self._start(200, _EVENTS)

    def write(self, body: bytes, *, more: bool = True) -> None:
        """Send bytes of the body; the last ones without `more`."""
        self.written_at = time.monotonic()
        self.body_bytes += len(body)
        self._push({"type": "http.response.body", "body": body, "more_body": more})

    async def flushed(self) -> None:
        """Wait until the server has taken all."""
        if self._sending is not None:
            await self._sending

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = True
        self.status = status
        self._push({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})

    def _push(self, message: dict[str, Any]) -> None:
        if self._sending is not None:
            self._unsent.append(message)
            self._unsent_bytes += len(message.get("body", b""))
            self.overflowed = self._unsent_bytes > UNSENT_BYTES_MAX
            return
        sending = self._send(message)
        try:
            waited_for = sending.send(None)
        except StopIteration:
            return
        except OSError:
            # Servers may say so that the caller is gone; `receive` says it as well.
            return
        self._sending = asyncio.get_running_loop().create_task(self._send_rest(sending, waited_for))

    async def _send_rest(self, sending: Coroutine[Any, Any, None], waited_for: Any) -> None:
        try:
            await _Resumed(sending, waited_for)
            while self._unsent:
                message = self._unsent.popleft()
                self._unsent_bytes -= len(message.get("body", b""))
                await self._send(message)
        except OSError:
            self._unsent.clear()
        finally:
            self._sending = None


class _Resumed:
    """A coroutine that was begun outside of a task, and what it waits for."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waited_for: Any) -> None:
        self._coroutine = coroutine
        self._waited_for = waited_for

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waited_for
        except BaseException:
            self._coroutine.close()
            raise
        yield from self._coroutine.__await__()


class Departure:
    """Calls somebody when the caller goes away, without a task: every request would make one, and nearly all cancel it.

    Args:
        receive: ASGI's, after the whole body was read.
        gone: Called once, unless `close` was called before.
    """

    __slots__ = ("_gone", "_waiting", "_watching")

    def __init__(self, receive: Receive, gone: Callable[[], None]) -> None:
        self._gone = gone
        self._watching = _departed(receive)
        self._waiting: asyncio.Future[Any] | None = None
        self._step()

    def close(self) -> None:
        """Watch no more. Safe to call twice."""
        if self._waiting is not None:
            self._waiting.remove_done_callback(self._step)
            self._waiting = None
        self._watching.close()

    def _step(self, _: object = None) -> None:
        try:
            self._waiting = self._watching.send(None)
        except StopIteration:
            self._waiting = None
            self._gone()
            return
        # What a task does with a future that it waits for.
        self._waiting._asyncio_future_blocking = False
        self._waiting.add_done_callback(self._step)


async def _departed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """The whole body of a request.

    Raises:
        TooLargeError: It is longer than `limit` bytes.
        DeadlineExceededError: Nothing came of it for too long.
        RequestCancelledError: The caller went away.
    """
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            async with asyncio.timeout(BODY_PAUSE_MS / 1_000):
                message = await receive()
        except TimeoutError:
            raise DeadlineExceededError(
                f"no more of the body came for {BODY_PAUSE_MS} ms", limit_ms=BODY_PAUSE_MS
            ) from None
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the caller closed the connection")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body", False):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)


def _too_large(size: int, limit: int) -> TooLargeError:
    return TooLargeError(f"the body has {size} bytes or more, limit is {limit}", size=size, limit=limit)
