"""How a gateway is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zfabric.errors import ConfigurationError
from zfabric.gateway.keys import KeyTable
from zfabric.limits import DRAIN_MS, GATEWAY_BODY_BYTES_MAX, GATEWAY_BODY_BYTES_MIN


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """All settings, checked.

    Attributes:
        host, port: Where to listen; port 0 is a free one.
        keys: Who may call; None for everybody.
        cors_origins: Origins of web pages that may call; "*" is all.
        body_limit: Bytes of a request's body at most.
        tls_cert, tls_key: PEM files, for HTTPS; both or none.
        drain_ms: How long a drain waits for what runs.
        chat_page: Whether there is a page at / to chat in.
        prefix_hints: Whether hashes of prompts are sent along, see `zfabric.client.options.GenerateOptions`.
        shared: Whether other processes listen at the same port (SO_REUSEPORT), each with a share of the connections.

    Raises:
        ConfigurationError: Something of it cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: KeyTable | None = None
    cors_origins: tuple[str, ...] = ()
    body_limit: int = GATEWAY_BODY_BYTES_MAX
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_ms: int = DRAIN_MS
    chat_page: bool = True
    prefix_hints: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigurationError(f"port is {self.port}, it must be 0 … 65535", parameter="port")
        if self.body_limit < GATEWAY_BODY_BYTES_MIN:
            raise ConfigurationError(
                f"body_limit is {self.body_limit}, it must be at least {GATEWAY_BODY_BYTES_MIN}", parameter="body_limit"
            )
        if self.drain_ms < 0:
            raise ConfigurationError(f"drain_ms is {self.drain_ms}, it must be at least 0", parameter="drain_ms")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("tls_cert and tls_key go together, one of them is missing", parameter="tls_cert")
        for name, path in (("tls_cert", self.tls_cert), ("tls_key", self.tls_key)):
            if path is not None and not path.is_file():
                raise ConfigurationError(f"{name} {path} is no file", parameter=name)
        for origin in self.cors_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise ConfigurationError(
                    f"cors_origins has {origin!r}, it must be * or like https://chat.example.org",
                    parameter="cors_origins",
                )
