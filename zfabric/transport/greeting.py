"""What the other end would speak: the start of a ZMTP handshake, as far as the security mechanism.

libzmq does not always say why a handshake failed: an end that finds the other's mechanism wrong closes the connection, and
often the other end sees no more than that. So who connects asks once more by hand, and has the other end find out as well.
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


async def exchange_mechanisms(endpoint: Endpoint, own: str) -> str | None:
    """Connect, and read the mechanism: "NULL", "CURVE" …. To an end of another one this side's is told, so that both know.

    Args:
        endpoint: With an address, not a name.
        own: This side's mechanism.

    Returns:
        None if nobody is there, or what is there does not speak ZMTP 3.
    """
    writer: asyncio.StreamWriter | None = None
    found: str | None = None
    try:
        async with asyncio.timeout(GREETING_MS / 1_000):
            if endpoint.is_ipc:
                reader, writer = await asyncio.open_unix_connection(endpoint.path)
            else:
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            writer.write(_START)
            greeting = await reader.readexactly(_LENGTH)
            if greeting[:1] == _START[:1] and greeting[10] >= _START[10]:
                found = greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
            if found not in (None, own):
                writer.write(own.encode().ljust(_MECHANISM.stop - _MECHANISM.start, b"\0"))
                writer.write(bytes(_LENGTH - _MECHANISM.stop))
                # The other end closes the connection as soon as it has read this.
                await reader.read()
    except (OSError, EOFError, TimeoutError):
        return found
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.transport.abort()
    return found
