"""Listening sockets for the event loop."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from zfabric import limits
from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.transport.addresses import listening_hosts
from zfabric.transport.endpoints import Endpoint, parse_endpoint, tcp_endpoint
from zfabric.transport.ipc import IpcLock

#: How often another free port is looked for that a second address family has free too.
_PORT_TRIES: Final = 16


def listen(endpoint: str, held: contextlib.ExitStack, *, other_users: bool = False) -> tuple[list[socket.socket], str]:
    """Listeners on all addresses of an endpoint, on one port.

    Args:
        held: What has to be let go of once they are closed is put there.
        other_users: Whether others than this user may connect to an ipc endpoint.

    Returns:
        The listeners, and the endpoint that peers on this host can use, with the port that was chosen.

    Raises:
        EndpointInUseError: Another controller has the endpoint.
        ConfigurationError: It cannot be bound.
    """
    parsed = parse_endpoint(endpoint, listens=True)
    try:
        if parsed.is_ipc:
            held.callback(IpcLock(parsed.path, other_users=other_users).release)
            return [_listen_ipc(parsed.path, 0 if other_users else 0o077)], endpoint
        # libzmq's * is IPv4 alone; an endpoint means the same with both drivers.
        hosts = ["0.0.0.0"] if parsed.host == "*" else listening_hosts(parsed)
        listeners = _listen_tcp(parsed, hosts)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EndpointInUseError(f"{endpoint} is in use by another process", endpoint=endpoint) from None
        raise ConfigurationError(f"{endpoint} cannot be bound: {error}", endpoint=endpoint) from error
    return listeners, tcp_endpoint("0.0.0.0" if parsed.host == "*" else parsed.host, listeners[0].getsockname()[1])


def _listen_ipc(path: str, mask: int) -> socket.socket:
    """A listener on a path, without the permissions of a mask."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(mask)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(limits.BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    listener.setblocking(False)
    return listener


def _listen_tcp(endpoint: Endpoint, hosts: Sequence[str]) -> list[socket.socket]:
    for tries in range(_PORT_TRIES):
        try:
            addresses = [
                (family, address)
                for host in hosts
                for family, _, _, _, address in socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
            ]
            return _bind_all(addresses, endpoint.port)
        except OSError as error:
            # Any port was asked for, and the first address's free one is taken at the next.
            if error.errno != errno.EADDRINUSE or endpoint.port or tries == _PORT_TRIES - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_all(addresses: Sequence[tuple[int, tuple[object, ...]]], port: int) -> list[socket.socket]:
    """One listener an address. A family that this host does not have is left out, if another is there."""
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                listener = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                missing = error
                continue
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address[0], port, *address[2:]))
                listener.listen(limits.BACKLOG)
            except OSError as error:
                listener.close()
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    missing = error
                    continue
                raise
            listener.setblocking(False)
            listeners.append(listener)
            port = port or listener.getsockname()[1]
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    if not listeners:
        raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return listeners
