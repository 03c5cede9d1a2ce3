"""Binding a socket to what an endpoint means: a Unix socket that nobody else holds, or all addresses of a name."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import zmq

from zfabric.errors import ConfigurationError, EndpointInUseError
from zfabric.transport.addresses import listening_hosts
from zfabric.transport.endpoints import Endpoint, parse_endpoint, tcp_endpoint
from zfabric.transport.ipc import IpcLock

#: A name may have addresses that this host does not, such as ::1 where IPv6 is off.
_NOT_HERE: Final = frozenset({zmq.EADDRNOTAVAIL, zmq.EAFNOSUPPORT, zmq.EPROTONOSUPPORT})
#: A port that is free at the first address of a name may be taken at the next.
_PORTS_TRIED_MAX: Final = 16


def listen(socket: zmq.Socket[bytes], endpoint: str, held: contextlib.ExitStack) -> str:
    """Bind.

    Args:
        held: What has to be let go of once the socket is closed is put there.

    Returns:
        The endpoint that peers on this host can use, with the port that was chosen.

    Raises:
        EndpointInUseError: Another controller has the endpoint.
        ConfigurationError: It cannot be bound.
    """
    parsed = parse_endpoint(endpoint, listens=True)
    try:
        if parsed.is_ipc:
            held.callback(IpcLock(parsed.path).release)
            return _bind(socket, endpoint)
        hosts = listening_hosts(parsed)
        if parsed.literal or hosts == [parsed.host]:
            return _bind(socket, tcp_endpoint(hosts[0], parsed.port))
        return _bind_name(socket, parsed, hosts)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise EndpointInUseError(f"{endpoint} is in use by another process", endpoint=endpoint) from None
        raise ConfigurationError(f"{endpoint} cannot be bound: {error}", endpoint=endpoint) from None


def _bind_name(socket: zmq.Socket[bytes], endpoint: Endpoint, hosts: Sequence[str]) -> str:
    for tries in range(_PORTS_TRIED_MAX):
        try:
            return _bind_all(socket, endpoint, hosts)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or endpoint.port or tries == _PORTS_TRIED_MAX - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_all(socket: zmq.Socket[bytes], endpoint: Endpoint, hosts: Sequence[str]) -> str:
    """Bind one port at all of a name's addresses that this host has, or nothing."""
    port = endpoint.port
    missing: zmq.ZMQError | None = None
    with contextlib.ExitStack() as undo:
        bound: list[str] = []
        for host in hosts:
            try:
                bound.append(_bind(socket, tcp_endpoint(host, port)))
            except zmq.ZMQError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
            else:
                undo.callback(socket.unbind, bound[-1])
                port = parse_endpoint(bound[-1]).port
        if missing is not None and not bound:
            raise missing
        undo.pop_all()
    return tcp_endpoint(endpoint.host, port)


def _bind(socket: zmq.Socket[bytes], where: str) -> str:
    # With it on, an IPv4 endpoint would be bound, and told to peers, in its IPv6 form.
    socket.setsockopt(zmq.IPV6, int("[" in where))
    socket.bind(where)
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
