"""uvicorn's HTTP on a connection, with bounds on the head of a request: it has none on its size, nor on the time it takes."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from zfabric.limits import BODY_PAUSE_MS, HEAD_BYTES_MAX

_TOO_LARGE: Final = f"The head of a request may have {HEAD_BYTES_MAX} bytes."


class BoundedHeads(HttpToolsProtocol):
    """Closes a connection whose next request does not begin in BODY_PAUSE_MS after it was made, or is not whole in so long
    after its first byte, and one whose head is larger than HEAD_BYTES_MAX."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head = True
        self._head_bytes = 0
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(_TOO_LARGE)
        elif self._waiting is None:
            self._wait()

    def on_message_begin(self) -> None:
        # What came with the request before is not counted: it is one read of the socket at most.
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait_no_more()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(BODY_PAUSE_MS / 1_000, self._waited)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _waited(self) -> None:
        self._waiting = None
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is on its way: the connection is needed until it has ended.
            self._wait()
        else:
            self.transport.close()

    def _refuse(self, why: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
        else:
            self.send_400_response(why)
