"""One upstream: its pooled connections, its answers as they come, its retries and its health."""

from __future__ import annotations

import asyncio
import functools
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlencode

import httpx2

from zfabric.backends.hf_api.breaker import CircuitBreaker
from zfabric.backends.hf_api.events import EventReader
from zfabric.backends.hf_api.failures import RETRIED, backoff_s, from_status, redacted, retry_after_s
from zfabric.backends.hf_api.lanes import ONE, Lanes
from zfabric.backends.hf_api.models_file import Upstream
from zfabric.errors import BackendError, ConnectionLostError, EngineStalledError, FabricError, RequestError
from zfabric.worker.traces import trace_headers

#: The most of an error's body that is read: its message is near the beginning.
_ERROR_BYTES_MAX: Final = 64 * 1024
#: The largest answer to an embedding call.
_ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
#: After an answer's end: how long its usage may take, and then the end of the response. A response that is read to its
#: end leaves a connection that can be used again.
USAGE_WAIT_S: Final = 2.0
CLOSE_WAIT_S: Final = 0.05
#: How OpenAI's server, and Azure's, say that a model bounds its answers by another name, or draws as it likes.
_REASONING_SIGNS: Final = ("'max_completion_tokens' instead", "'temperature' does not support")
#: Answers of a probe that a gateway gives for a server which is not there.
_GATEWAY: Final = frozenset({502, 503, 504})


class AttemptError(Exception):
    """One try failed.

    Attributes:
        error: What the caller is told if there is no other try.
        transient: Whether another try may do better.
        asked_s: Seconds that the server asks to wait, None if it asks none.
    """

    def __init__(self, error: FabricError, *, transient: bool, asked_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.transient = transient
        self.asked_s = asked_s


class Channel:
    """Connections to one upstream.

    Args:
        upstream: Where, and how.
        on_change: Called when the circuit breaker opens or closes, or something was learned of the model.

    Attributes:
        upstream: Where, and how, by all that is known by now.
        configured: The same as the models file says it.
        batch_size: Inputs per call: what the models file says, or less where the server has said so.
    """

    def __init__(self, upstream: Upstream, on_change: Callable[[], None]) -> None:
        self.upstream = self.configured = upstream
        self.batch_size = upstream.batch_size
        self.breaker = CircuitBreaker()
        self._on_change = on_change
        self._rng = random.Random()
        self._active = 0
        self._retired = False
        self._prober: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._lanes = Lanes(functools.partial(_client, upstream), upstream.slots + upstream.parallel)

    @property
    def name(self) -> str:
        return self.upstream.name

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Channel:
        """Hold it open for one request."""
        self._active += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._active -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """Nothing new comes; it closes when the last request has ended."""
        self._retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and not self._active and self._closer is None:
            self._closer = asyncio.get_running_loop().create_task(self.close())

    async def close(self) -> None:
        """Close all connections at once."""
        if self._prober is not None:
            self._prober.cancel()
        await self._lanes.close()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def events(
        self, path: str, body: dict[str, Any], patience_s: Callable[[], float | None]
    ) -> AsyncIterator[bytes]:
        """Data of the events of one answer. Closing the generator closes the connection.

        Args:
            path, body: What to ask.
            patience_s: Seconds to wait for more once all that matters has come, None before.

        Raises:
            AttemptError: With ConnectionLostError, EngineStalledError or what the server answered.
        """
        upstream, loop = self.upstream, asyncio.get_running_loop()
        reader = EventReader()
        limit_ms = upstream.first_token_ms
        deadline = loop.time() + limit_ms / 1_000
        try:
            async with self._lanes.lane() as client:
                async with asyncio.timeout_at(deadline):
                    response = await self._send(client, path, body)
                try:
                    self._check_kind(response)
                    pieces = aiter(response.aiter_raw())
                    while True:
                        async with asyncio.timeout_at(deadline):
                            piece = await anext(pieces, None)
                        if piece is None:
                            return
                        for data in reader.feed(piece):
                            self.breaker.succeeded()
                            yield data
                            limit_ms = upstream.between_tokens_ms
                            rest_s = patience_s()
                            deadline = loop.time() + (limit_ms / 1_000 if rest_s is None else rest_s)
                finally:
                    await response.aclose()
        except TimeoutError:
            if patience_s() is not None:
                return
            raise self._failed(
                EngineStalledError(
                    f"upstream of {self.name!r} sent nothing for {limit_ms} ms", model=self.name, limit_ms=limit_ms
                )
            ) from None
        except httpx2.HTTPError as error:
            if patience_s() is not None:
                return
            raise self._failed(self._lost(error)) from None

    def _check_kind(self, response: httpx2.Response) -> None:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            error = BackendError(f"upstream of {self.name!r} answered with {kind[:100]!r} instead of events")
            raise AttemptError(error, transient=False)

    async def call(self, path: str, body: dict[str, Any]) -> bytes:
        """One answer as a whole, tried again as often as the models file says.

        Raises:
            FabricError: The last failure.
        """
        for attempt in range(self.upstream.attempts):
            try:
                return await self._call(path, body)
            except AttemptError as failure:
                await self.pause(attempt, failure)
        raise AssertionError("the last pause raises")

    async def pause(self, attempt: int, failure: AttemptError) -> None:
        """Wait until another try makes sense.

        Raises:
            FabricError: The failure itself, if it does not.
        """
        wait_s = backoff_s(attempt, failure.asked_s, self._rng) if failure.transient else None
        if wait_s is None or attempt + 1 >= self.upstream.attempts:
            raise failure.error from None
        await asyncio.sleep(wait_s)

    async def _call(self, path: str, body: dict[str, Any]) -> bytes:
        limit_ms = self.upstream.first_token_ms
        try:
            async with asyncio.timeout(limit_ms / 1_000), self._lanes.lane() as client:
                response = await self._send(client, path, body)
                try:
                    answer = await _limited(response, _ANSWER_BYTES_MAX)
                finally:
                    await response.aclose()
        except TimeoutError:
            message = f"upstream of {self.name!r} did not answer in {limit_ms} ms"
            raise self._failed(EngineStalledError(message, model=self.name, limit_ms=limit_ms)) from None
        except httpx2.HTTPError as error:
            raise self._failed(self._lost(error)) from None
        self.breaker.succeeded()
        return answer

    async def _send(self, client: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> httpx2.Response:
        """The response, its body not read yet, if it is a good one."""
        asked = client.build_request("POST", self._url(path), json=body, headers=trace_headers())
        response = await client.send(asked, stream=True)
        if response.status_code == 200:
            return response
        try:
            told = await _limited(response, _ERROR_BYTES_MAX, cut=True)
        finally:
            await response.aclose()
        status = response.status_code
        error = from_status(status, told, self.name, self.upstream.secrets)
        if status >= 500:
            self._note_failure()
        elif status not in RETRIED:
            self.breaker.succeeded()
        asked_s = retry_after_s(response.headers.get("retry-after"), response.headers.get("date"))
        raise AttemptError(error, transient=status in RETRIED, asked_s=asked_s)

    def learn(self, error: FabricError) -> bool:
        """Whether an error says that the model is one that thinks before it answers, and that was not known: then it is now."""
        if self.upstream.reasoning or (self.upstream.protocol, self.upstream.server) != ("chat", "openai"):
            return False
        if not isinstance(error, RequestError) or not any(sign in error.message for sign in _REASONING_SIGNS):
            return False
        self.upstream = replace(self.upstream, reasoning=True)
        self._on_change()
        return True

    def _url(self, path: str) -> str:
        url = self.upstream.base_url.rstrip("/") + path
        return f"{url}?{urlencode({'api-version': self.upstream.api_version})}" if self.upstream.api_version else url

    def cut(self) -> AttemptError:
        """The upstream closed before the answer's end."""
        return self._failed(ConnectionLostError(f"upstream of {self.name!r} closed in mid-answer", model=self.name))

    def _lost(self, error: Exception) -> FabricError:
        told = redacted(str(error), self.upstream.secrets) or type(error).__name__
        return ConnectionLostError(f"upstream of {self.name!r} is lost: {told}", model=self.name)

    def _failed(self, error: FabricError) -> AttemptError:
        self._note_failure()
        return AttemptError(error, transient=True)

    # ── health ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Raises: ConnectionLostError while the upstream is taken out, so that other workers get the request."""
        if not self.breaker.dispatchable:
            raise ConnectionLostError(f"upstream of {self.name!r} is taken out after failures", model=self.name)

    def _note_failure(self) -> None:
        loop = asyncio.get_running_loop()
        if self.breaker.failed(loop.time()) and not self._retired:
            self._on_change()
            if self._prober is None or self._prober.done():
                self._prober = loop.create_task(self._probe_back(), name=f"probe-{self.name}")

    async def _probe_back(self) -> None:
        """Ask again and again until it answers."""
        loop = asyncio.get_running_loop()
        while not self.breaker.dispatchable:
            await asyncio.sleep(self.breaker.wait_s(loop.time()))
            if not self.breaker.begin_probe(loop.time()):
                continue
            if await self._answers():
                self.breaker.probed()
            else:
                self.breaker.failed(loop.time())
        self._on_change()

    async def _answers(self) -> bool:
        """Whether a server is there. What it says to this question does not matter, unless a gateway says it."""
        url = self._url(self.upstream.probe_path)
        try:
            async with (
                asyncio.timeout(self.upstream.connect_ms / 1_000),
                self._lanes.lane() as client,
                client.stream("GET", url) as response,
            ):
                return response.status_code not in _GATEWAY
        except (TimeoutError, httpx2.HTTPError):
            return False


async def _limited(response: httpx2.Response, limit: int, *, cut: bool = False) -> bytes:
    """The body up to a limit. Raises: AttemptError for more, unless it may be cut."""
    body = bytearray()
    async with aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > limit:
                if cut:
                    break
                error = BackendError(f"upstream answered with more than {limit} bytes", bytes_max=limit)
                raise AttemptError(error, transient=False)
    return bytes(body[:limit])


def _client(upstream: Upstream) -> httpx2.AsyncClient:
    headers = {"User-Agent": "zfabric", "Accept-Encoding": "identity", **upstream.headers}
    if upstream.token:
        name, value = ("api-key", "") if upstream.api_version else ("Authorization", "Bearer ")
        headers[name] = value + upstream.token
    return httpx2.AsyncClient(
        headers=headers,
        verify=_ssl_context(secure=upstream.base_url.startswith("https:")),
        timeout=httpx2.Timeout(upstream.first_token_ms / 1_000, connect=upstream.connect_ms / 1_000, read=None),
        limits=ONE,
    )


@functools.cache
def _ssl_context(*, secure: bool) -> ssl.SSLContext:
    """One for all upstreams: making one takes milliseconds, and tens of them where there are certificates to load."""
    return ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
