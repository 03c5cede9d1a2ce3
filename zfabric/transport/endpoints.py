"""Where a fabric listens: default endpoint, and checks that make a bad endpoint a clear error.

On one host nobody has to give an endpoint: all sides derive the same Unix socket in a directory that only the user can
enter, because whoever can connect to an ipc socket can exhaust the controller's file descriptors.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from zfabric.errors import ConfigurationError
from zfabric.limits import IPC_PATH_LENGTH_MAX

#: Overrides the default endpoint of clients, workers and controller alike.
ENDPOINT_VARIABLE: Final = "ZFABRIC_ENDPOINT"
_LOOPBACK: Final = ("localhost", "::1")


def default_endpoint() -> str:
    """$ZFABRIC_ENDPOINT, else a Unix socket in the user's runtime directory."""
    given = os.environ.get(ENDPOINT_VARIABLE)
    if given:
        return given.split(",")[0].strip()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "zfabric" if runtime else Path(tempfile.gettempdir()) / f"zfabric-{os.getuid()}"
    return f"ipc://{base / 'controller.sock'}"


def check_endpoint(endpoint: str) -> str:
    """The endpoint unchanged.

    Raises:
        ConfigurationError: Not ipc://PATH, tcp://HOST:PORT or inproc://NAME, or an ipc path that is too long.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in {"ipc", "tcp", "inproc"} or not rest:
        raise ConfigurationError(f"endpoint {endpoint!r} is not ipc://PATH or tcp://HOST:PORT", endpoint=endpoint)
    if scheme == "ipc":
        if len(rest.encode()) > IPC_PATH_LENGTH_MAX:
            raise ConfigurationError(
                f"ipc path of {len(rest.encode())} bytes is too long, limit is {IPC_PATH_LENGTH_MAX}: {rest}",
                endpoint=endpoint,
            )
        if rest.startswith("@"):
            raise ConfigurationError("abstract sockets have no permissions, give a path", endpoint=endpoint)
    if scheme == "tcp" and not rest.rpartition(":")[2].replace("*", "0").isdigit():
        raise ConfigurationError(f"endpoint {endpoint!r} has no port", endpoint=endpoint)
    return endpoint


def is_local(endpoint: str) -> bool:
    """Whether only this host can reach the endpoint."""
    if not endpoint.startswith("tcp://"):
        return True
    host = urlsplit(endpoint.replace("*", "0.0.0.0", 1)).hostname or ""
    return host in _LOOPBACK or host.startswith("127.")


def ipc_path(endpoint: str) -> Path | None:
    """The socket's path, None for other transports."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None


def prepare_ipc_directory(path: Path) -> None:
    """Make the socket's directory, for its owner alone.

    Raises:
        ConfigurationError: The directory belongs to somebody else, or others may enter it.
    """
    directory = path.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid():
        raise ConfigurationError(f"{directory} belongs to uid {status.st_uid}, not to uid {os.getuid()}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigurationError(
            f"{directory} has mode {stat.S_IMODE(status.st_mode):04o}, the socket's directory must be 0700"
        )
