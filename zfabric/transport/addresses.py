"""From an endpoint to addresses. libzmq takes the first address of a name and forgets the others; localhost has two on most
machines, and a listener at one of them is not found at the other.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import Any, Final

from zfabric.errors import ConfigurationError
from zfabric.transport.endpoints import Endpoint, is_localhost, is_loopback

_FAMILIES: Final = frozenset({socket.AF_INET, socket.AF_INET6})


def listening_hosts(endpoint: Endpoint) -> list[str]:
    """At which addresses a controller has to listen: at all of a name. Waits for the system's look-up of names.

    Returns:
        One at least; a network interface as it is, since libzmq knows those.

    Raises:
        ConfigurationError: The name is not known.
    """
    if endpoint.literal or endpoint.host in {name for _, name in socket.if_nameindex()}:
        return [endpoint.host]
    try:
        hosts = _hosts(endpoint, socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{_no_host(endpoint)}: {error}", endpoint=endpoint.text) from error
    if not hosts:
        raise ConfigurationError(_no_host(endpoint), endpoint=endpoint.text)
    return hosts


async def dialed_hosts(endpoint: Endpoint) -> list[str]:
    """At which addresses a controller may be found, in the order in which to try.

    Raises:
        OSError: The name is not known, or nobody can be asked now.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(str(error)) from error
    return _hosts(endpoint, found)


def _hosts(endpoint: Endpoint, found: Iterable[tuple[Any, ...]]) -> list[str]:
    hosts = [str(address[0]) for family, _, _, _, address in found if family in _FAMILIES]
    if is_localhost(endpoint.host):
        # Whatever a resolver says: the name promises that nobody else can be reached by it, nor reach it.
        hosts = [host for host in hosts if is_loopback(host)]
    return list(dict.fromkeys(hosts))


def _no_host(endpoint: Endpoint) -> str:
    return f"{endpoint.text} cannot be bound: {endpoint.host!r} is neither a name with an address nor an interface"
