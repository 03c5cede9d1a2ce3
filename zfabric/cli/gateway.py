"""zfabric-gateway: flags → GatewayConfig → Gateway, or several of them at one port."""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts

from zfabric import limits
from zfabric.cli.app import make_app, run_app
from zfabric.cli.children import Command
from zfabric.cli.daemon import on_hangup, on_signals, ready, run
from zfabric.cli.logs import LogFormat, LogLevel, events, make_logger
from zfabric.cli.metrics import metrics_at
from zfabric.cli.settings import CONFIG_VARIABLE
from zfabric.cli.supervise import Supervisor
from zfabric.cli.traces import traces_to
from zfabric.client.aio import AsyncClient
from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.files import WatchedFile
from zfabric.fleet.limits import RESTART_MAX_MS
from zfabric.transport.curve import credentials_of
from zfabric.transport.endpoints import check_endpoints, default_endpoint

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from zfabric.gateway.config import GatewayConfig
    from zfabric.gateway.server import Gateway

HELP = """The OpenAI API over HTTP, for programs that speak it: a client of the fabric as any other.

**Examples**

On one host nothing has to be given: `zfabric-gateway`

`curl http://127.0.0.1:8000/v1/chat/completions -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}'`

For other hosts, with keys and TLS: `zfabric-gateway --host 0.0.0.0 --api-keys keys.toml --tls-cert c.pem --tls-key k.pem`

More callers than one core can serve: `zfabric-gateway --workers 4`

Settings come from flags, then ZFABRIC_GATEWAY_… variables, then the [gateway] table of a TOML file.
SIGTERM drains: nothing new is taken, what runs may finish within --drain-ms, and the exit code is 0.
"""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How the gateway is a client of the fabric."""

    endpoint: str
    key: Path | None
    controller_key: Path | None
    transport: str | None

    def connect(self, identity: str | None, tracing: bool | TracerProvider = False) -> AsyncClient:
        """A client that shows this secret key file, or the gateway's own. Raises: ConfigurationError."""
        credentials = credentials_of(identity or self.key, self.controller_key)
        return AsyncClient(
            self.endpoint, label="gateway", credentials=credentials, transport=self.transport, tracing=tracing
        )


def build(arguments: list[str]) -> cyclopts.App:
    """The command's parser."""
    app = make_app("zfabric-gateway", HELP, "gateway", arguments)

    @app.default
    def gateway(
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        endpoint: str | None = None,
        key: Path | None = None,
        controller_key: Path | None = None,
        api_keys: Path | None = None,
        workers: int = 1,
        cors_origin: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=False)] = (),
        body_limit: int = limits.GATEWAY_BODY_BYTES_MAX,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        chat_page: bool = True,
        prefix_hints: bool = False,
        transport: str | None = None,
        traces: str | None = None,
        drain_ms: int = limits.DRAIN_MS,
        metrics: str | None = None,
        log_level: LogLevel = "info",
        log_format: LogFormat = "auto",
        uvloop: bool = True,
        shared_port: Annotated[bool, cyclopts.Parameter(show=False)] = False,
        config: Annotated[Path | None, cyclopts.Parameter(env_var=CONFIG_VARIABLE)] = None,
    ) -> int:
        """Run a gateway.

        Args:
            host: Where to listen: a name or an address of this host; 0.0.0.0 and :: are all.
            port: Where to listen; 0 is a free one.
            endpoint: The controller's, or those of several with commas between them; $ZFABRIC_ENDPOINT, else this host's default.
            key: The gateway's secret key file, for a controller with keys; $ZFABRIC_KEY by default.
            controller_key: The controller's public key file; $ZFABRIC_CONTROLLER_KEY by default.
            api_keys: TOML file of the keys that may call; without it everybody may who can connect.
            workers: Processes that share the port, each with a connection to the controller of its own.
            cors_origin: A web page's origin that may call from a browser, or *; repeat for several.
            body_limit: Bytes of a request at most.
            tls_cert: PEM file with the certificate chain, for HTTPS; goes with --tls-key.
            tls_key: PEM file with the certificate's key.
            chat_page: Have a page at / to chat in.
            prefix_hints: Send hashes of prompts along, for a controller with the policy prefix_aware.
            transport: The driver of the socket, loop or libzmq; $ZFABRIC_TRANSPORT, else loop, by default.
            traces: Export traces by OTLP over HTTP to this collector, as http://localhost:4318, or to the one that
                OTEL_EXPORTER_OTLP_… variables name (env).
            drain_ms: How long a drain waits for running requests.
            metrics: Serve OpenMetrics at this PORT (of loopback) or HOST:PORT, under /metrics; with --workers, each process
                at a port of its own, from this one upwards.
            log_level: debug, info, warning or error.
            log_format: console, json, or auto (by terminal).
            uvloop: Use uvloop where it is installed.
            config: TOML file.
        """
        if workers < 1:
            raise ConfigurationError(f"workers is {workers}, it must be at least 1", parameter="workers")
        parts = _parts()
        settings = parts.GatewayConfig(
            host=host, port=port, keys=parts.read_keys(api_keys) if api_keys is not None else None,
            cors_origins=cors_origin, body_limit=body_limit, tls_cert=tls_cert, tls_key=tls_key, drain_ms=drain_ms,
            chat_page=chat_page, prefix_hints=prefix_hints, shared=shared_port,
        )  # fmt: skip
        link = Link(
            endpoint=check_endpoints(endpoint or default_endpoint()), key=key, controller_key=controller_key,
            transport=transport,
        )  # fmt: skip
        if workers == 1:
            return run(serve(settings, link, api_keys, log_level, log_format, metrics, traces), use_uvloop=uvloop)
        same = _flags(
            host=host, endpoint=link.endpoint, key=key, controller_key=controller_key, api_keys=api_keys,
            cors_origin=cors_origin, body_limit=body_limit, tls_cert=tls_cert, tls_key=tls_key, transport=transport,
            traces=traces, drain_ms=drain_ms, log_level=log_level, log_format=log_format, config=config,
        )  # fmt: skip
        same += ["--uvloop" if uvloop else "--no-uvloop", "--chat-page" if chat_page else "--no-chat-page"]
        same += ["--prefix-hints"] if prefix_hints else []
        return run(serve_several(settings, same, _ports(metrics, workers), log_level, log_format), use_uvloop=uvloop)

    return app


def _parts() -> _Parts:
    """The gateway's package. Raises: ConfigurationError: What it needs is not installed."""
    try:
        importlib.import_module("zfabric.gateway.server")
    except ImportError as error:
        raise ConfigurationError(f"the gateway needs {error.name}: pip install 'zfabric[gateway]'") from None
    return _Parts()


class _Parts:
    """What is imported only when a gateway is started, since its server is an extra."""

    def __init__(self) -> None:
        from zfabric.gateway.config import GatewayConfig
        from zfabric.gateway.keys import read_keys
        from zfabric.gateway.server import Gateway

        self.GatewayConfig, self.read_keys, self.Gateway = GatewayConfig, read_keys, Gateway


def _flags(**settings: object) -> list[str]:
    """Settings as another process of this command takes them."""
    flags: list[str] = []
    for name, value in settings.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            flags += [f"--{name.replace('_', '-')}", str(one)]
    return flags


def _ports(metrics: str | None, workers: int) -> list[list[str]]:
    """For each process the flags of its metrics: a scraper adds up what processes tell, as it does for hosts."""
    if metrics is None:
        return [[]] * workers
    host, separator, port = metrics.rpartition(":")
    first = int(port) if port.isdecimal() else 0
    return [["--metrics", f"{host}{separator}{first + number if first else port}"] for number in range(workers)]


async def serve(
    settings: GatewayConfig,
    link: Link,
    keys: Path | None,
    level: LogLevel,
    form: LogFormat,
    metrics: str | None,
    traces: str | None,
) -> int:
    """Run until drained."""
    log = make_logger("gateway", level, form)
    stopped = asyncio.Event()
    parts = _parts()
    told = events(log)
    async with (
        traces_to(traces, "zfabric-gateway", told) as provider,
        parts.Gateway(settings, partial(link.connect, tracing=provider or False), told) as gateway,
    ):

        async def drain() -> None:
            await gateway.drain()
            log.info("drained")
            stopped.set()

        on_signals(drain)
        watching = _watch(keys, parts, gateway, log)
        with metrics_at(metrics, "gateway", gateway.figures) as url:
            ready(url=gateway.url, **url)
            await stopped.wait()
        if watching is not None:
            watching.cancel()
    return 0


def _watch(path: Path | None, parts: _Parts, gateway: Gateway, log: Any) -> asyncio.Task[None] | None:
    """Take other keys when their file changes, and at SIGHUP, which ends no gateway without keys either."""
    file = None if path is None else WatchedFile(path, parts.read_keys, gateway.take_keys, events(log))

    async def reload() -> None:
        if file is not None:
            file.read()

    on_hangup(reload)
    if file is None:
        return None
    # It may have changed since the settings were checked.
    file.read()
    return asyncio.create_task(file.watch(), name="keys")


async def serve_several(
    settings: GatewayConfig, same: Sequence[str], each: Sequence[list[str]], level: LogLevel, form: LogFormat
) -> int:
    """Run processes that share a port until drained. Args: each: Flags of each process, beside the same of all."""
    log = make_logger("gateway", level, form)
    stopped = asyncio.Event()
    supervisor = Supervisor(events(log), settings.drain_ms / 1_000 + RESTART_MAX_MS / 1_000)
    with _reserved(settings.host, settings.port) as place:
        port = place.getsockname()[1]
        flags = [*same, "--port", str(port), "--workers", "1", "--shared-port"]
        on_signals(lambda: _stop(supervisor, stopped))

        async def hang_up() -> None:
            supervisor.hang_up()

        on_hangup(hang_up)
        try:
            told = await asyncio.gather(
                *(
                    supervisor.add(Command(name=f"gateway-{n}", module="zfabric.cli.gateway", arguments=(*flags, *own)))
                    for n, own in enumerate(each)
                )
            )
        except BaseException:
            await supervisor.stop()
            raise
        at = ",".join(one["metrics"] for one in told if "metrics" in one)
        ready(url=told[0]["url"], workers=len(each), **({"metrics": at} if at else {}))
        await stopped.wait()
    return 0


async def _stop(supervisor: Supervisor, stopped: asyncio.Event) -> None:
    await supervisor.stop()
    stopped.set()


def _reserved(host: str, port: int) -> socket.socket:
    """A port that this user's processes may share. It takes no connections itself. Raises: EndpointInUseError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # Other processes of this user that share the port would share its callers, unseen.
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError as error:
        raise EndpointInUseError(f"{host}:{port} cannot be listened at: {error}", endpoint=f"{host}:{port}") from None
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_app(build, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
