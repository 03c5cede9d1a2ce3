"""What the other end would speak: the start of a ZMTP handshake, read only as far as the security mechanism.

libzmq does not always say why a handshake failed: an end that finds the other's mechanism wrong closes the connection, and
often the other end sees no more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from zfabric.limits import GREETING_MS
from zfabric.transport.endpoints import Endpoint

#: Signature and version (ZMTP 3.1): after these each end tells its mechanism, without waiting for the other's.
_START: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01"
_LENGTH: Final = 64
_MECHANISM: Final = slice(12, 32)


async def mechanism_of(endpoint: Endpoint) -> str | None:
    """Connect, and read the mechanism: "NULL", "CURVE" …

    Args:
        endpoint: With an address, not a name.

    Returns:
        None if nobody is there, or what is there does not speak ZMTP 3.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(GREETING_MS / 1_000):
            if endpoint.is_ipc:
                reader, writer = await asyncio.open_unix_connection(endpoint.path)
            else:
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            writer.write(_START)
            greeting = await reader.readexactly(_LENGTH)
    except (OSError, EOFError, TimeoutError):
        return None
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.transport.abort()
    if greeting[:1] != _START[:1] or greeting[10] < _START[10]:
        return None
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
