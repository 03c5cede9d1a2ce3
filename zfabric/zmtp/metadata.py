"""Properties that peers tell each other at the end of a handshake (RFC 37, "The NULL Security Mechanism" and "Connection
Metadata"; RFC 26 has the same form).

M1  A property is a name of 1 to 255 characters with its size in one octet, and a value with its size in four.
M2  Names are the same in upper and lower case; letters, digits and - _ . + are allowed.
M3  Socket-Type says who speaks, and only certain types may speak to each other. A peer that does not say is let in, as
    libzmq does.
M4  Identity has up to 255 octets. It is not used here: the ROUTER gives names of its own.
"""

from __future__ import annotations

import re
from typing import Final

from zfabric.zmtp.faults import HandshakeError
from zfabric.zmtp.frames import command

DEALER: Final = b"DEALER"
ROUTER: Final = b"ROUTER"
#: Whom each type may speak to ("The Socket-Type Property").
_PEERS: Final = {
    DEALER: frozenset({b"REP", b"DEALER", b"ROUTER"}),
    ROUTER: frozenset({b"REQ", b"DEALER", b"ROUTER"}),
}
_NAME: Final = re.compile(rb"[A-Za-z0-9\-_.+]+")
_IDENTITY_BYTES_MAX: Final = 255


def own_properties(socket_type: bytes) -> bytes:
    """What this side tells: in the order, and with the empty identity, that libzmq sends."""
    return b"".join(_property(name, value) for name, value in ((b"Socket-Type", socket_type), (b"Identity", b"")))


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def parse_properties(data: bytes) -> dict[str, bytes]:
    """Values by name, in lower case.

    Raises:
        HandshakeError: The data are not a list of properties, or one is told twice.
    """
    found: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        start = position + 1
        name = data[start : start + data[position]]
        start += data[position]
        if len(data) - start < 4 or not _NAME.fullmatch(name):  # M1, M2
            raise HandshakeError("metadata with a name that is cut or empty, or has characters that are not allowed")
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):  # M1
            raise HandshakeError(f"metadata {name.decode()} is cut", property=name.decode())
        key = name.decode().lower()
        if key in found:
            raise HandshakeError(f"metadata {key} is told twice", property=key)
        found[key] = data[start + 4 : end]
        position = end
    return found


def check_peer(socket_type: bytes, properties: dict[str, bytes]) -> None:
    """Whether a peer with these properties may speak to us.

    Raises:
        HandshakeError: By M3 or M4. Its reply is the ERROR command that RFC 37 asks for.
    """
    theirs = properties.get("socket-type")
    if theirs is not None and theirs not in _PEERS[socket_type]:
        text = theirs[:32].decode("ascii", "replace")
        raise HandshakeError(
            f"socket of type {text!r} cannot speak to a {socket_type.decode()}",
            reply=error_command(b"Invalid socket type"),
            socket_type=text,
        )
    if len(properties.get("identity", b"")) > _IDENTITY_BYTES_MAX:
        raise HandshakeError(f"identity of {len(properties['identity'])} bytes, limit is {_IDENTITY_BYTES_MAX}")


def error_command(reason: bytes) -> bytes:
    """An ERROR: why the other side is refused. libzmq understands the status codes of RFC 27, such as 400."""
    return command(b"ERROR", bytes((len(reason),)) + reason)


def error_reason(data: bytes) -> str:
    """What an ERROR says. Raises: HandshakeError."""
    if not data or data[0] > len(data) - 1:
        raise HandshakeError("the peer's ERROR command is cut")
    return data[1 : 1 + data[0]].decode("ascii", "replace")
