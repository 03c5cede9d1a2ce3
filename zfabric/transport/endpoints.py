"""Endpoints: the default one, what each part of one means, and checks that make a bad one a clear error before a socket is
made.

On one host nobody has to give an endpoint: all sides derive the same Unix socket in a directory that only the user can
enter, because whoever can connect to an ipc socket can exhaust the controller's file descriptors.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from zfabric.errors import ConfigurationError
from zfabric.limits import IPC_PATH_LENGTH_MAX

#: Overrides the default endpoint of clients, workers and controller alike.
ENDPOINT_VARIABLE: Final = "ZFABRIC_ENDPOINT"
#: Names of hosts and network interfaces, in ASCII: labels of letters, digits, hyphens and underscores.
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_DIGITS: Final = re.compile(r"[0-9]{1,5}")
_PORT_MAX: Final = 65_535


class Endpoint(NamedTuple):
    """The parts of an endpoint.

    Attributes:
        text: As it was given.
        path: Of an ipc socket, "" for tcp.
        host: Address without brackets, name, or "*" for all addresses; "" for ipc.
        port: Of tcp, 0 for any that is free.
        literal: Whether the host is an address, and nothing has to be looked up.
        file: What holds the endpoint; "" where it is one itself.
    """

    text: str
    path: str = ""
    host: str = ""
    port: int = 0
    literal: bool = True
    file: str = ""

    @property
    def is_ipc(self) -> bool:
        """Whether it is a Unix socket."""
        return bool(self.path)

    @property
    def named(self) -> bool:
        """Whether its host is a name that may stand for several hosts."""
        return not self.literal and not self.file and not is_localhost(self.host)

    def now(self) -> Endpoint:
        """Where to connect to now: itself, or what its file holds at this moment.

        Raises:
            ConfigurationError: What the file holds is no endpoint, or the name of another file.
            OSError: There is no such file, or it cannot be read.
        """
        if not self.file:
            return self
        held = Path(self.file).read_text(encoding="utf-8", errors="backslashreplace").strip()
        found = parse_endpoint(held)
        if found.file:
            raise _wrong(self.text, f"holds {held!r}, which is a file again")
        return found


def default_endpoint() -> str:
    """$ZFABRIC_ENDPOINT, which may name several controllers, else a Unix socket in the user's runtime directory.

    Raises:
        ConfigurationError: The system has no Unix sockets, so that an endpoint has to be given.
    """
    given = os.environ.get(ENDPOINT_VARIABLE)
    if given:
        return given
    if not has_ipc():
        raise ConfigurationError(
            f"{sys.platform} has no default endpoint; give tcp://127.0.0.1:PORT, or set ${ENDPOINT_VARIABLE}"
        )
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    try:
        base = Path(runtime) / "zfabric" if runtime else Path(tempfile.gettempdir()) / f"zfabric-{os.geteuid()}"
    except OSError as error:
        raise ConfigurationError(f"there is no directory for the default endpoint: {error}") from error
    return f"ipc://{base / 'controller.sock'}"


def has_ipc() -> bool:
    """Whether this system has Unix sockets whose owner can be told."""
    return sys.platform != "win32" and hasattr(os, "geteuid")


def check_endpoint(endpoint: str, *, listens: bool = False) -> str:
    """The endpoint unchanged. Arguments and errors as of `parse_endpoint`."""
    return parse_endpoint(endpoint, listens=listens).text


def check_endpoints(endpoints: str) -> str:
    """One endpoint to connect to, or several with commas between them, unchanged. Raises: ConfigurationError."""
    parse_endpoints(endpoints)
    return endpoints


def parse_endpoints(endpoints: str) -> list[Endpoint]:
    """Endpoints to connect to, with commas between them, each once. Raises: ConfigurationError: One is none, or there is none.

    Example: ``parse_endpoints("tcp://a:5555,tcp://b:5555")``
    """
    if not isinstance(endpoints, str) or "," not in endpoints:
        return [parse_endpoint(endpoints)]
    parts = [part.strip() for part in endpoints.split(",")]
    return [parse_endpoint(part) for part in dict.fromkeys(part for part in parts if part)] or [parse_endpoint("")]


def parse_endpoint(endpoint: str, *, listens: bool = False) -> Endpoint:
    """Take an endpoint apart; no name is looked up for it, and no file read.

    Args:
        listens: For who listens, who may say "*" for the host or the port, or 0 for the port, and name an interface. Who
            connects may name a file that holds the endpoint, as file:///PATH.

    Raises:
        ConfigurationError: Not ipc://PATH or tcp://HOST:PORT, or a part of it cannot be right.
    """
    if not isinstance(endpoint, str):
        raise ConfigurationError(f"endpoint {endpoint!r} is no text such as ipc://PATH or tcp://HOST:PORT")
    scheme, separator, rest = endpoint.partition("://")
    if scheme == "ipc" and separator:
        return _parse_ipc(endpoint, rest)
    if scheme == "tcp" and separator:
        return _parse_tcp(endpoint, rest, listens)
    if scheme == "file" and separator:
        return _parse_file(endpoint, rest, listens)
    raise _wrong(endpoint, "is not ipc://PATH or tcp://HOST:PORT")


def is_local(endpoint: str) -> bool:
    """Whether only this host can reach a checked endpoint. Of names only localhost is known to be loopback."""
    found = parse_endpoint(endpoint, listens=True)
    return found.is_ipc or is_loopback(found.host)


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return is_localhost(host)


def is_localhost(host: str) -> bool:
    """Whether it is the name that means this host everywhere."""
    return host.rstrip(".").lower() == "localhost"


def tcp_endpoint(address: str, port: int) -> str:
    """The endpoint of an address."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _wrong(endpoint: str, why: str) -> ConfigurationError:
    shown = endpoint.encode("utf-8", "backslashreplace").decode()
    return ConfigurationError(f"endpoint {shown!r} {why}", endpoint=shown)


def _parse_ipc(endpoint: str, path: str) -> Endpoint:
    if not has_ipc():
        raise _wrong(endpoint, f"cannot be used: {sys.platform} has no Unix sockets, give tcp://127.0.0.1:PORT")
    if not path or path == "*":
        raise _wrong(endpoint, "has no path")
    if path.startswith("@"):
        raise _wrong(endpoint, "is an abstract socket, which has no permissions; give a path")
    if "\0" in path:
        raise _wrong(endpoint, "has a NUL character in its path")
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise _wrong(endpoint, "has a path that is not UTF-8") from None
    if size > IPC_PATH_LENGTH_MAX:
        raise _wrong(endpoint, f"is too long: its path has {size} bytes, limit is {IPC_PATH_LENGTH_MAX}")
    if path.endswith("/") or os.path.isdir(path):
        raise _wrong(endpoint, "is a directory; give the path of a socket in it")
    return Endpoint(endpoint, path=path)


def _parse_file(endpoint: str, path: str, listens: bool) -> Endpoint:
    if listens:
        raise _wrong(endpoint, "is a file that holds an endpoint; only who connects can be given one")
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise _wrong(endpoint, "is no file:///PATH of a file that holds an endpoint")
    return Endpoint(endpoint, literal=False, file=path)


def _parse_tcp(endpoint: str, rest: str, listens: bool) -> Endpoint:
    host, separator, port = rest.rpartition(":")
    if not separator or not port or "]" in port:
        raise _wrong(endpoint, "has no port")
    if listens and port == "*":
        port = "0"
    if not _DIGITS.fullmatch(port) or int(port) > _PORT_MAX or (int(port) == 0 and not listens):
        raise _wrong(endpoint, f"has the port {port!r}, which is not one of {0 if listens else 1} … {_PORT_MAX}")
    host, literal = _parse_host(endpoint, host, listens)
    return Endpoint(endpoint, host=host, port=int(port), literal=literal)


def _parse_host(endpoint: str, host: str, listens: bool) -> tuple[str, bool]:
    """The host without brackets, and whether it is an address."""
    if not host:
        raise _wrong(endpoint, "has no host")
    if host == "*":
        if not listens:
            raise _wrong(endpoint, "has no host to connect to; only a controller can listen on *")
        return host, True
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), True
        except ValueError as error:
            raise _wrong(endpoint, f"has no IPv6 address in its brackets: {error}") from None
    if ":" in host and "[" not in host:
        raise _wrong(endpoint, "needs brackets around its IPv6 address: tcp://[ADDRESS]:PORT")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host)), True
        except ValueError as error:
            raise _wrong(endpoint, f"has no IPv4 address: {error}") from None
    if not _NAME.fullmatch(host):
        raise _wrong(endpoint, f"has the host {host!r}, which is neither an address nor a name")
    if not listens and host in {name for _, name in socket.if_nameindex()}:
        raise _wrong(endpoint, f"has the host {host!r}, a network interface; only a controller can listen on one")
    return host, False
