"""The application on uvicorn, on the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import uvicorn

from zfabric.client.aio import AsyncClient
from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.gateway.app import Application
from zfabric.gateway.config import GatewayConfig
from zfabric.gateway.fabric import FabricClient
from zfabric.gateway.keys import KeyTable
from zfabric.gateway.protocol import BoundedHeads
from zfabric.limits import BACKLOG, HTTP_IDLE_MS


class _Server(uvicorn.Server):
    """One that leaves signals to its host program, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """A gateway that listens within an `async with`.

    Args:
        config: How it is started.
        connect: Makes the client of the fabric that shows the secret key of this file, None for the gateway's own identity.
        log: Called with an event and its fields.

    Attributes:
        url: Where it listens, such as "http://127.0.0.1:8000".
        figures: What it counts.

    Raises:
        ConfigurationError, EndpointInUseError: It cannot listen there.

    Example:
        >>> async with Gateway(GatewayConfig(port=0), lambda _: AsyncClient()) as gateway:
        ...     print(gateway.url)
    """

    def __init__(
        self,
        config: GatewayConfig,
        connect: Callable[[str | None], AsyncClient],
        log: Callable[..., Any] = lambda *_, **__: None,
    ) -> None:
        self.url = ""
        self._log = log
        self._config = config
        self._connect = connect
        identities = {None, *(config.keys.fabric_keys if config.keys is not None else ())}
        self._fabrics = {identity: self._client(identity) for identity in identities}
        self._app = Application(config, self._fabrics, log)
        self.figures = self._app.figures
        self._socket: socket.socket | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Gateway:
        tls = _tls(self._config)
        self._socket = _listen(self._config)
        settings = uvicorn.Config(
            self._app, http=BoundedHeads, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=HTTP_IDLE_MS // 1_000, timeout_graceful_shutdown=max(self._config.drain_ms // 1_000, 1),
            backlog=BACKLOG, proxy_headers=False,
        )  # fmt: skip
        settings.load()
        settings.ssl = tls
        self._server = _Server(settings)
        for fabric in self._fabrics.values():
            fabric.open()
        self._serving = asyncio.create_task(self._server.serve([self._socket]), name="gateway-server")
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            await self._close()
            self._serving.result()
            raise ConfigurationError("the server ended at its start")
        host, port = self._socket.getsockname()[:2]
        self.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
        self._log("listening", endpoint=self.url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()

    def _client(self, identity: str | None) -> FabricClient:
        return FabricClient(self._connect(identity), self._log, prefix_hints=self._config.prefix_hints)

    def take_keys(self, keys: KeyTable) -> None:
        """Other keys from now on. What runs goes on; a caller whose key is gone is refused at its next request.

        Raises:
            FabricError: An identity of theirs cannot be used; nothing has changed then.
        """
        new = {name: self._client(name) for name in keys.fabric_keys if name not in self._fabrics}
        for fabric in new.values():
            fabric.open()
        # Those that nobody has any more stay until the end: answers may still be on their way.
        self._fabrics |= new
        self._app.keys = keys

    async def drain(self) -> None:
        """Take no new connections, let what runs end within the limit, and close. Safe to call twice."""
        if self._server is None or self._serving is None or self._app.draining:
            return
        self._app.draining = True
        self._log("draining")
        self._server.should_exit = True
        await asyncio.gather(self._serving, return_exceptions=True)
        await self._close()

    async def _close(self) -> None:
        for fabric in self._fabrics.values():
            await fabric.close()
        if self._socket is not None:
            self._socket.close()


def _listen(config: GatewayConfig) -> socket.socket:
    """A socket that is bound. Raises: EndpointInUseError, ConfigurationError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigurationError(f"host {config.host!r} has no address: {error}", parameter="host") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config.shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise EndpointInUseError(
            f"{config.host}:{config.port} cannot be listened at: {error}", endpoint=f"{config.host}:{config.port}"
        ) from None
    return made


def _tls(config: GatewayConfig) -> ssl.SSLContext | None:
    """Raises: ConfigurationError: The files are no certificate and its key."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"tls_cert and tls_key cannot be used: {error}", parameter="tls_cert") from None
    return context
